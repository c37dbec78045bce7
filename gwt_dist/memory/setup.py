"""An engine and those of its settings that change bytes."""

from __future__ import annotations

from dataclasses import dataclass

DTYPES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
DEVICES = "cuda", "cpu"
ENGINES = ("single", "ddp", "zro", "oss", "zero0", "zero1", "zero2", "zero3", "fsdp2", "fsdp1", "fairscale")
MESHES = ("fsdp2", "fsdp1")  # those that may shard over a part of the ranks and replicate over the rest
MOST_RANKS = 100_000  # each is planned by itself: so many take seconds
NORM = 8  # bytes of a squared norm in its collective: fp64


@dataclass(frozen=True, slots=True)
class Setup:
    """An engine and what of its settings changes bytes; see `gwt-dist plan --help`."""

    engine: str
    world_size: int = 1
    replicas: int = 1  # HSDP, HYBRID_SHARD: the mesh is replicas x shards
    weights: str = "bf16"
    gradients: str | None = None  # as the weights
    offload: str = "none"  # "optimizer": masters and state on the host; "weights"; "both"
    sub_group_size: int = 1_000_000_000
    round_robin: bool = False
    parameter_alignment: bool = False
    persistence_threshold: int = 100_000  # ZeRO-3 keeps tensors of at most so many elements whole as well
    persistence_total: int | None = None  # ... and of all of them no more than this; None: no bound
    use_orig_params: bool = True  # FSDP1
    flatten: bool = True  # fairscale
    device: str = "cuda"  # where it trains; "cuda": GPUs with units for bf16

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine {self.engine!r} must be one of {', '.join(ENGINES)}")
        for key, value in (("weights", self.weights), ("gradients", self.gradients or self.weights)):
            if value not in DTYPES:
                raise ValueError(f"dtype {value!r} of {key} must be one of {', '.join(DTYPES)}")
        if self.device not in DEVICES:
            raise ValueError(f"device {self.device!r} must be one of {', '.join(DEVICES)}")
        if self.world_size < 1 or self.replicas < 1 or self.world_size % self.replicas:
            raise ValueError(f"{self.world_size} ranks cannot be {self.replicas} replicas of equal size")
        if self.world_size > MOST_RANKS:
            raise ValueError(
                f"{self.world_size:,} ranks are more than {MOST_RANKS:,}, and a plan of each of them takes too long; "
                f"plan fewer: what a rank holds hardly changes beyond"
            )
        if self.engine == "single" and self.world_size > 1:
            raise ValueError(f"engine single is one process, not {self.world_size}; choose another, such as ddp")
        if self.replicas > 1 and self.engine not in MESHES:
            raise ValueError(f"{self.engine} has no mesh of replicas; {' and '.join(MESHES)} have")
        if self.offload not in ("none", "optimizer", "weights", "both"):
            raise ValueError(f"offload {self.offload!r} must be none, optimizer, weights or both")
        allowed = {"zero1": ("optimizer",), "zero2": ("optimizer",), "fsdp2": ("both",)}.get(self.engine, ())
        if self.offload not in ("none", *(allowed if self.engine != "zero3" else ("optimizer", "weights", "both"))):
            raise ValueError(
                f"{self.engine} cannot offload {self.offload}; zero1 and zero2 can the optimizer, zero3 each, and "
                f"fsdp2 both at once (CPUOffloadPolicy)"
            )
        if self.sub_group_size < 1:
            raise ValueError(f"sub_group_size={self.sub_group_size} must be at least 1")

    @property
    def shards(self) -> int:
        """Ranks that hold different things of one tensor."""
        return self.world_size // self.replicas if self.engine not in ("single", "ddp", "zero0") else 1

    @property
    def ranks_a_shard(self) -> int:
        """Ranks that hold the same."""
        return self.world_size // self.shards

    @property
    def bf16_optimizer(self) -> bool:
        """DeepSpeed takes its `BF16_Optimizer`, which keeps fp32 gradients of the whole model on each rank."""
        return self.engine == "zero1" and self.weights == "bf16" and self.gradients == "fp32"

    @property
    def masters(self) -> bool:
        """fp32 copies of the weights that the optimizer steps."""
        return self.engine in ("zero1", "zero2", "zero3") or (self.engine == "zero0" and self.weights != "fp32")

    @property
    def state_bytes(self) -> int:
        """Of a number in the format fp32: fp64 for fp64 weights, fp32 for all others."""
        return 8 if self.weights == "fp64" and not self.masters else 4

    def bytes_of(self, what: str) -> int:
        """Of an element of "weights" or "gradients"."""
        return DTYPES[self.weights if what == "weights" else self.gradients or self.weights]

    def bytes_of_products(self, products: str) -> int:
        """Of an element of the matrices that travel: what `products.dtype_of` says where the optimizer steps."""
        on_gpu = self.device == "cuda" and self.offload not in ("optimizer", "both")
        fast = products == "bf16" or (products == "auto" and on_gpu and self.state_bytes == 4)
        return DTYPES["bf16"] if fast else self.state_bytes
