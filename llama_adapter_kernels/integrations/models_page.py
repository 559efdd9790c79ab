"""docs/models.md, written from the table of architectures: python -m llama_adapter_kernels.integrations.models_page"""

from pathlib import Path

from llama_adapter_kernels.integrations.architectures import Architecture, Fused, Separate
from llama_adapter_kernels.integrations.registry import known_architectures
from llama_adapter_kernels.integrations.transformers.architectures import CANNOT

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_KINDS = {
    "decoder": "Decoders",
    "part": "Language parts of multimodal models",
    "encoder": "Encoders of text, pictures and sound",
    "timm": "timm",
}

_HEAD = """\
# Models that take adapters

This page is written from the table of architectures (`llama_adapter_kernels/integrations/`). Every row is a test: with its
gates closed the model is the base model; with open gates results and gradients equal an eager computation that shares no
code with the package; padding, generation or classification, saving and loading.

Projections may be any modules: linear layers, quantised ones (with buffers only), wrapped by LoRA. Attention dropout works,
more slowly: load a model to be trained with `attention_dropout=0` (`attention_probs_dropout_prob=0` for BERT and its like,
`attn_pdrop=0` for GPT-2).
"""

_OWN = """\
## Your own model

    import llama_adapter_kernels as lak

    lak.register_architecture(lak.Architecture(
        model_type="my_decoder",                  # of the model's configuration
        attention="blocks.*.attn",                # where its attention modules are, * for the number
        project=lak.Fused("qkv", "groups"),       # or lak.Separate("k_proj", "v_proj"), or a function
        causal=True,
    ))
    adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=10))

The attention modules call transformers' attention interface (`ALL_ATTENTION_FUNCTIONS`) and hand keyword arguments of the
model's forward pass down to it. `lak.Architecture` says what else can be described, `lak.Fused` and `lak.Separate` which
layouts of projections. A function takes `(module, prompts [N, P, hidden], heads)` and returns the keys and values
`[N, heads, P, head_dim]` that the module would make of the prompts, without the position embedding.
"""


def page() -> str:
    """The text of docs/models.md."""
    rows = [row for row in known_architectures() if row.model_type not in _registered_by_users()]
    parts = [_HEAD]
    for kind, title in _KINDS.items():
        lines = [_line(row) for row in rows if row.kind == kind]
        if lines:
            table = "| model_type | models | attention modules | key and value from |\n|---|---|---|---|\n"
            parts.append(f"## {title}\n\n{table}" + "\n".join(lines) + "\n")
    reasons: dict[str, list[str]] = {}
    for kind, reason in CANNOT.items():
        reasons.setdefault(reason, []).append(kind)
    refused = "\n".join(f"- {', '.join(kinds)}: {reason}." for reason, kinds in reasons.items())
    parts.append(f"## Models that cannot\n\nAttaching to one of these is refused, with the reason.\n\n{refused}\n")
    parts.append(_OWN)
    return "\n".join(parts)


def _registered_by_users() -> set[str]:
    from llama_adapter_kernels.integrations import timm
    from llama_adapter_kernels.integrations.transformers import architectures

    ours = {row.model_type for row in (*architectures.ROWS, *timm.ROWS)}
    return {row.model_type for row in known_architectures()} - ours


def _line(row: Architecture) -> str:
    project = row.project
    if isinstance(project, Fused):
        text = f"`{project.projection}`, {project.layout}"
    elif isinstance(project, Separate):
        text = f"`{project.key}`, `{project.value}`"
    else:
        text = "a function"
    norm = getattr(project, "key_norm", None)
    place = f"{row.stem}.{row.attention}" if row.stem else row.attention
    return f"| {row.model_type} | {row.example} | `{place}` | {text}{f', `{norm}`' if norm else ''} |"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
