"""Runs the CUDA launchers in the emulator on the problems of `llama_adapter_kernels.testing`."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llama_adapter_kernels.testing import Problem

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MASKS = {torch.bool: 1, torch.float32: 2, torch.bfloat16: 3, torch.float16: 4, torch.float64: 5}


class EmulatedProblem:
    """Describes a problem to the launchers; outputs are NaN until a kernel writes them."""

    def __init__(self, emulator: ModuleType, problem: Problem, seed: int = 0, deterministic: bool = False) -> None:
        self.emulator = emulator
        self.problem = problem
        self.kept: list[Tensor] = []  # tensors whose addresses are in `params`
        emulator.forget_memory()
        emulator.set_seed(seed)
        case = problem.case
        tensors = {name: None if t is None else t.detach() for name, t in problem.tensors.items()}
        query, key = tensors["query"], tensors["key"]
        assert query is not None
        assert key is not None
        self.query = query
        self.packed = query.dim() == 3
        arguments = problem.arguments
        rows = 0 if self.packed else 2
        scale = case.scale if case.scale is not None else query.shape[-1] ** -0.5
        self.params: dict[str, Any] = {
            "batch": len(case.lengths) if case.lengths is not None else query.shape[0],
            "heads_q": query.shape[1], "heads_kv": key.shape[1], "head_dim": query.shape[-1],
            "seq_q": arguments.get("max_seqlen_q", query.shape[rows]),
            "seq_k": arguments.get("max_seqlen_k", key.shape[rows]),
            "total_q": query.shape[rows], "total_k": key.shape[rows], "prefix_length": 0, "prefix_count": 0,
            "dtype": DTYPES[query.dtype], "scale": scale, "is_causal": int(arguments.get("is_causal", False)),
            "deterministic": int(deterministic),
        }  # fmt: skip
        for name in ("query", "key", "value"):
            self._view(name, tensors[name], writable=False)
        prefix_key, gate = tensors["prefix_key"], tensors["gate"]
        if prefix_key is not None and gate is not None:
            self.params["prefix_count"], _, self.params["prefix_length"], _ = prefix_key.shape
            self._view("prefix_key", prefix_key, writable=False)
            self._view("prefix_value", tensors["prefix_value"], writable=False)
            self.gate_shape = gate.shape
            gate = gate.expand(prefix_key.shape[0], query.shape[1])
            self.params["gate"] = [self._register("gate", gate, False), *gate.stride()]
            self.gate = gate
        for name in ("key_start", "key_end", "cu_seqlens_q", "cu_seqlens_k", "prefix_index"):
            if arguments.get(name) is not None:
                self.params[name] = self._register(name, arguments[name].int().contiguous(), False)
        mask = arguments.get("attn_mask")
        if mask is not None:
            mask = mask.expand(*query.shape[:3], key.shape[2])
            self.params["mask"] = [self._register("attn_mask", mask, False), *mask.stride(), MASKS[mask.dtype]]

    def _register(self, name: str, tensor: Tensor, writable: bool) -> int:
        """Registers the elements from the first to the last, not the storage around them."""
        self.kept.append(tensor)
        if tensor.numel() > 0:
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            size = (last + 1) * tensor.element_size()
            self.emulator.register_memory(name, tensor.data_ptr(), size, writable)
        return tensor.data_ptr()

    def _view(self, name: str, tensor: Tensor | None, writable: bool) -> Tensor:
        assert tensor is not None
        address = self._register(name, tensor, writable)
        packed = tensor.dim() == 3
        batch, head, row = (0, tensor.stride(1), tensor.stride(0)) if packed else tensor.stride()[:3]
        self.params[name] = [address, batch, head, row]
        return tensor

    def _new(self, name: str, like: Tensor) -> Tensor:
        return self._view(name, torch.empty_like(like).fill_(torch.nan), writable=True)

    def _run(self, function: str) -> None:
        code = getattr(self.emulator, function)(self.params)
        assert code == 0, self.emulator.error(code)

    def _workspace(self, function: str) -> None:
        size = getattr(self.emulator, f"{function}_workspace")(self.params)
        # Not a byte more than asked for, and NaN (or a wild index) in each of them.
        workspace = torch.full((size + 64,), 0xFF, dtype=torch.uint8)
        shift = -workspace.data_ptr() % 64
        self.params["workspace"] = self._register("workspace", workspace[shift : shift + size], True)

    def forward(self, need_logsumexp: bool = True) -> tuple[Tensor, Tensor]:
        """(output, logsumexp), of which the second is NaN where nobody asks for it."""
        output = self._new("output", self.query)
        rows = (self.query.shape[1], self.query.shape[0]) if self.packed else self.query.shape[:3]
        logsumexp = torch.full(rows, torch.nan)
        strides = (0, logsumexp.stride(0)) if self.packed else logsumexp.stride()[:2]
        if need_logsumexp:
            self.params["logsumexp"] = [self._register("logsumexp", logsumexp, True), *strides]
        self._run("forward")
        return output, logsumexp

    def decode(self) -> Tensor:
        output = self._new("output", self.query)
        self._workspace("decode")
        self._run("decode")
        return output

    def backward(
        self, need_dquery: bool = True, need_dkey_dvalue: bool = True, need_dprefix: bool = True
    ) -> dict[str, Tensor]:
        """After `forward`: gradients by name, of those that are asked for."""
        assert self.problem.doutput is not None
        self._view("doutput", self.problem.doutput.contiguous(), writable=False)
        gradients: dict[str, Tensor] = {}
        wanted = ["query"] * need_dquery + ["key", "value"] * need_dkey_dvalue
        if need_dprefix and self.params["prefix_count"] > 0:
            wanted += ["prefix_key", "prefix_value"]
            dgate = torch.full(self.gate.shape, torch.nan)
            self.params["dgate"] = self._register("dgate", dgate, True)
            gradients["dgate"] = dgate
        for name in wanted:
            tensor = self.problem.tensors[name]
            assert tensor is not None
            gradients[f"d{name}"] = self._new(f"d{name}", tensor.detach())
        self._workspace("backward")
        self._run("backward")
        if "dgate" in gradients:
            gradients["dgate"] = gradients["dgate"].sum_to_size(self.gate_shape)
        return gradients
