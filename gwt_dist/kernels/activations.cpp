// Activations in 8 bits, one pass over memory each way: see `activations.codes`, whose codes these are, bit for bit, of
// numbers that are finite. A group of 128 neighbours is read into fp32 once, and all else happens in the first cache.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#pragma GCC optimize("O3")

namespace {

constexpr int64_t GROUP = 128, LANES = 16;
constexpr float LARGEST = 255;
constexpr uint32_t LOWER = 0xFFFF;  // the bits of fp32 that bf16 has not

struct Half {
  uint16_t bits;  // of bf16
};

inline float read(float x) { return x; }
inline float read(Half x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void put(float& to, float x) { to = x; }
inline void put(Half& to, float x) {  // to nearest, to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const bool is_nan = (bits & 0x7FFFFFFF) > 0x7F800000;
  to.bits = is_nan ? 0x7FC0 : static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline uint16_t upper(float x, bool up) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (up) {
    if (std::isfinite(x)) bits += LOWER;  // of what is not negative
  } else if (bits >> 31 && bits & LOWER) {
    bits += LOWER + 1;  // to drop bits brings a number nearer to 0
  }
  return static_cast<uint16_t>(bits >> 16);
}

template <typename T>
void encode_group(const T* x, int64_t n, uint8_t* code, uint16_t* lo_bits, uint16_t* scale_bits) {
  float value[GROUP], least[LANES], most[LANES];
  for (int64_t i = 0; i < n; ++i) value[i] = read(x[i]);
  for (int64_t i = n; i < GROUP; ++i) value[i] = value[n - 1];
  int32_t none = 0;
  for (int64_t k = 0; k < LANES; ++k) least[k] = most[k] = value[k];
  for (int64_t i = 0; i < GROUP; i += LANES) {
    for (int64_t k = 0; k < LANES; ++k) {
      const float v = value[i + k];
      least[k] = v < least[k] ? v : least[k];
      most[k] = v > most[k] ? v : most[k];
      none |= v != v;
    }
  }
  float low = *std::min_element(least, least + LANES), high = *std::max_element(most, most + LANES);
  if (none) low = high = std::numeric_limits<float>::quiet_NaN();
  *lo_bits = none ? 0x7FC0 : upper(low, false);
  const float lo = read(Half{*lo_bits});
  const float exact = high / LARGEST - lo / LARGEST;
  *scale_bits = exact == exact ? upper(exact, true) : 0x7FC0;
  const float scale = read(Half{*scale_bits});
  const float inverse = scale > 0 ? 1 / scale : 0;
  uint8_t found[GROUP];
  for (int64_t i = 0; i < GROUP; ++i) {
    const float t = __builtin_rintf((value[i] - lo) * inverse);
    found[i] = static_cast<uint8_t>(static_cast<int32_t>(t > 0 ? (t < LARGEST ? t : LARGEST) : 0));
  }
  std::memcpy(code, found, n);
}

template <typename T>
void decode_group(const uint8_t* code, int64_t n, float lo, float scale, T* x) {
  float value[GROUP];
  for (int64_t i = 0; i < n; ++i) value[i] = static_cast<float>(static_cast<int32_t>(code[i])) * scale + lo;
  for (int64_t i = 0; i < n; ++i) put(x[i], value[i]);
}

// Tensors are dense: x and code [T, C], lo and scale [T, G].
template <typename T, bool ENCODES>
void run(T* x, uint8_t* code, uint16_t* lo, uint16_t* scale, int64_t tokens, int64_t columns) {
  const int64_t groups = (columns + GROUP - 1) / GROUP;
  at::parallel_for(0, tokens, std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, columns)), [=](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = t * columns + g * GROUP, n = std::min(GROUP, columns - g * GROUP), i = t * groups + g;
        if (ENCODES) encode_group<T>(x + at, n, code + at, lo + i, scale + i);
        else decode_group<T>(code + at, n, read(Half{lo[i]}), read(Half{scale[i]}), x + at);
      }
    }
  });
}

template <bool ENCODES>
void of(const at::Tensor& x, const at::Tensor& code, const at::Tensor& lo, const at::Tensor& scale) {
  const int64_t tokens = x.size(0), columns = x.size(1);
  TORCH_CHECK(code.scalar_type() == at::kByte && lo.scalar_type() == at::kBFloat16 && scale.scalar_type() == at::kBFloat16,
              "gwt_dist: codes are uint8, and what goes with them is bf16");
  for (const at::Tensor* each : {&x, &code, &lo, &scale})
    TORCH_CHECK(each->is_contiguous() && each->device().is_cpu() && each->dim() == 2 && each->size(0) == tokens,
                "gwt_dist: a dense tensor of ", tokens, " tokens on the CPU is needed");
  TORCH_CHECK(code.size(1) == columns && lo.size(1) == (columns + GROUP - 1) / GROUP && scale.size(1) == lo.size(1),
              "gwt_dist: codes of ", columns, " numbers a token are needed");
  uint8_t* codes = static_cast<uint8_t*>(code.data_ptr());
  uint16_t *los = static_cast<uint16_t*>(lo.data_ptr()), *scales = static_cast<uint16_t*>(scale.data_ptr());
  const bool halves = x.scalar_type() == at::kBFloat16;
  TORCH_CHECK(halves || x.scalar_type() == at::kFloat, "gwt_dist: fp32 or bf16 is needed, not ", x.scalar_type());
  void* data = x.data_ptr();
  py::gil_scoped_release without_gil;
  if (halves) run<Half, ENCODES>(static_cast<Half*>(data), codes, los, scales, tokens, columns);
  else run<float, ENCODES>(static_cast<float*>(data), codes, los, scales, tokens, columns);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("encode", &of<true>);
  m.def("decode", &of<false>);
}
