// How fast memory lets a step be: the traffic of each optimizer with next to no arithmetic, in turn, in one run.
//
//   g++ -O3 -march=native -ffast-math -fopenmp benchmarks/traffic.cpp -o /tmp/traffic
//   OMP_NUM_THREADS=2 OMP_PROC_BIND=true /tmp/traffic
//
// Prints milliseconds (medians) for 16.8 M fp32 elements and the median of ratios to AdamW's traffic in the same round.
// A guide and no bound: loops of another form move the same bytes at up to a quarter less speed.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <vector>

namespace {

constexpr long N = 1 << 24, BLOCK = 4096;  // elements in all, and those that a thread takes at once
constexpr int ROUNDS = 41;
std::vector<float> w(N, 1e-3f), g(N, 1e-3f), m(N, 1e-3f), v(N, 1e-3f);

// Reads gradient, reads and writes weight and both moments: 28 bytes an element.
void adamw() {
#pragma omp parallel for simd
  for (long i = 0; i < N; ++i) {
    m[i] = m[i] * .9f + g[i], v[i] = v[i] * .9f + g[i];
    w[i] -= m[i] * v[i];
  }
}

template <int U>
void decay_moments(long block) {
  for (long i = block * (BLOCK / U); i < (block + 1) * (BLOCK / U); ++i) m[i] = m[i] * .9f + 1e-9f, v[i] = v[i] * .9f + 1e-9f;
}

void write_weights(long block, float more) {
#pragma omp simd
  for (long i = block * BLOCK; i < (block + 1) * BLOCK; ++i) w[i] -= g[i] * 1e-3f + more;
}

// Moments of N / U elements, everything touched once.
template <int U>
void one_pass() {
#pragma omp parallel for
  for (long block = 0; block < N / BLOCK; ++block) decay_moments<U>(block), write_weights(block, 0);
}

// Gradient and moments first, then gradient, moments and weight, backwards: what was read last is still in caches.
template <int U>
void two_phases() {
  float sum = 0;
#pragma omp parallel for reduction(+ : sum)
  for (long block = 0; block < N / BLOCK; ++block) {
    float own = 0;
#pragma omp simd reduction(+ : own)
    for (long i = block * BLOCK; i < (block + 1) * BLOCK; ++i) own += g[i];
    decay_moments<U>(block);
    sum += own;
  }
#pragma omp parallel for
  for (long taken = 0; taken < N / BLOCK; ++taken) {
    const long block = N / BLOCK - 1 - taken;
    float own = 0;
    for (long i = block * (BLOCK / U); i < (block + 1) * (BLOCK / U); ++i) own += m[i] * v[i];
    write_weights(block, own * 1e-9f * sum);
  }
}

struct Pattern {
  const char* name;
  double bytes;
  std::function<void()> run;
  std::vector<double> seconds, ratios;
};

double median(std::vector<double>& values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace

int main() {
  std::vector<Pattern> patterns = {{"AdamW", 28, adamw, {}, {}},
                                   {"one pass, level 2", 16, one_pass<4>, {}, {}},
                                   {"one pass, level 3", 14, one_pass<8>, {}, {}},
                                   {"two phases, level 2", 22, two_phases<4>, {}, {}},
                                   {"two phases, level 3", 19, two_phases<8>, {}, {}}};
  for (int round = 0; round < ROUNDS; ++round) {
    for (Pattern& pattern : patterns) {
      const auto begin = std::chrono::steady_clock::now();
      pattern.run();
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
      if (round == 0) continue;  // pages are touched for the first time
      pattern.seconds.push_back(took.count());
      pattern.ratios.push_back(took.count() / patterns[0].seconds.back());
    }
  }
  for (Pattern& pattern : patterns) {
    const double seconds = median(pattern.seconds);
    std::printf("%-20s %6.2f ms %6.1f GB/s  ratio %.3f\n", pattern.name, 1e3 * seconds, pattern.bytes * N / seconds / 1e9,
                median(pattern.ratios));
  }
}
