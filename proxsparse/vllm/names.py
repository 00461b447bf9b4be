"""Which parts of a vLLM layer are packed, by the names in config.json, and what was made of them.

vLLM merges projections of one input into one layer: `qkv_proj` is `q_proj`, `k_proj` and `v_proj`
behind one another. config.json names what the checkpoint holds, so a merged layer is looked up by
its parts. This file knows nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from proxsparse.errors import ProxsparseError

MULTIPLE = 8  # of in_features, where ranks share them: a byte of codes holds eight columns
_LISTED = 6  # names that a message lists before it only counts


class PackedNames:
    """The names of the packed layers, and which of them a layer of the model has taken up.

    Args:
        names: dotted names of the modules that are packed, as the model calls them.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._taken: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def rename(self, names: Iterable[str]) -> None:
        """Replace the names by those that the model uses."""
        self._names = set(names)

    def packed_parts(self, prefix: str, parts: Sequence[str]) -> list[bool]:
        """Which parts of a layer are packed.

        Args:
            prefix: the layer's dotted name, such as "model.layers.0.self_attn.qkv_proj".
            parts: the last names of what it was merged from; its own last name where it was not.

        Returns:
            One answer a part. A layer that is one on disk too is named as a whole.
        """
        if prefix in self._names:
            self._taken.add(prefix)
            return [True] * len(parts)
        parent = prefix.rpartition(".")[0]
        names = [f"{parent}.{part}" if parent else part for part in parts]
        self._taken.update(name for name in names if name in self._names)
        return [name in self._names for name in names]

    def inside(self, prefix: str) -> list[str]:
        """The packed names that are a module itself or lie in it."""
        return sorted(n for n in self._names if n == prefix or n.startswith(f"{prefix}."))

    def left_over(self) -> list[str]:
        """The packed names that no layer has taken up."""
        return sorted(self._names - self._taken)

    @property
    def is_any_taken(self) -> bool:
        """Whether a layer has taken up a name."""
        return bool(self._taken)


def check_all_taken(names: PackedNames) -> None:
    """Refuse packed names that are no linear layers of the model.

    Raises:
        ProxsparseError: names them.
    """
    left = names.left_over()
    if left:
        raise ProxsparseError(
            f"config.json says that {listed(left)} {'is' if len(left) == 1 else 'are'} packed, but "
            "the model that vLLM builds has no linear layer of that name: the config belongs to "
            "another model, or this vLLM names its layers otherwise. `proxsparse unpack DIR DENSE` "
            "writes a model that any vLLM serves, and `--quantization proxsparse` packs that while "
            "loading"
        )


def check_split(name: str, in_features: int, ranks: int) -> None:
    """Refuse a number of ranks that would cut a byte of codes in two.

    Args:
        name: of the layer.
        in_features: of the whole layer.
        ranks: that share them.

    Raises:
        ProxsparseError: the share of a rank is no multiple of `MULTIPLE`; names the numbers of
            ranks that work.
    """
    if ranks == 1 or not (in_features // ranks) % MULTIPLE:
        return
    works = [n for n in range(1, ranks) if not in_features % (n * MULTIPLE)] or [1]
    raise ProxsparseError(
        f"{name} has {in_features} input features, which over {ranks} ranks are "
        f"{in_features // ranks} each: a packed layer can be split into multiples of {MULTIPLE} "
        f"only. Use --tensor-parallel-size {' or '.join(map(str, works))}, or serve the model "
        "that `proxsparse unpack` writes"
    )


def packed_sizes(name: str, is_packed: Sequence[bool], sizes: Sequence[int]) -> list[bool]:
    """Which of the parts that vLLM keeps apart are packed.

    Args:
        name: of the layer.
        is_packed: of each part by name.
        sizes: output features of each part that vLLM knows.

    Raises:
        ProxsparseError: some are packed and some are not, and there are more of one than of the
            other.
    """
    if all(is_packed):
        return [True] * len(sizes)
    if len(is_packed) != len(sizes):
        raise ProxsparseError(
            f"{name} is merged of {len(is_packed)} projections of which some are packed and some "
            f"are not, but vLLM keeps {len(sizes)} parts of it: prune and pack all of them, or "
            "none"
        )
    return list(is_packed)


@dataclass
class Summary:
    """What became of a model's layers, for one line of the log.

    Attributes:
        dense_bytes: of the sparse layers, were they dense.
        stored_bytes: that they take.
    """

    dense_bytes: int = 0
    stored_bytes: int = 0
    _sparse: set[str] = field(default_factory=set)
    _dense: dict[str, str] = field(default_factory=dict)

    def add_sparse(self, name: str, dense_bytes: int, stored_bytes: int, mixed: str = "") -> None:
        """A layer that runs sparse; `mixed` says which of its rows do not."""
        self._sparse.add(name)
        self.dense_bytes += dense_bytes
        self.stored_bytes += stored_bytes
        if mixed:
            self._dense[name] = mixed

    def add_dense(self, name: str, reason: str) -> None:
        """A layer that runs dense."""
        self._dense[name] = reason

    @property
    def num_sparse(self) -> int:
        """Layers that run sparse, in part at least."""
        return len(self._sparse)

    @property
    def dense(self) -> dict[str, str]:
        """Name -> reason, of what runs dense."""
        return dict(self._dense)

    def __str__(self) -> str:
        total = len(self._sparse | self._dense.keys())
        saved = self.dense_bytes - self.stored_bytes
        text = (
            f"{self.num_sparse} of {total} linear layers run sparse, in "
            f"{self.stored_bytes / 2**20:.1f} MiB instead of {self.dense_bytes / 2**20:.1f}: "
            f"{saved / 2**20:.1f} MiB saved"
        )
        for reason in dict.fromkeys(self._dense.values()):
            names = [name for name, why in self._dense.items() if why == reason]
            text += f"; {reason}: {listed(names)}"
        return text


def listed(names: Sequence[str]) -> str:
    """A few names, and how many more there are."""
    text = ", ".join(names[:_LISTED])
    return text if len(names) <= _LISTED else f"{text} and {len(names) - _LISTED} more"
