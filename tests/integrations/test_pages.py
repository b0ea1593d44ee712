"""Each page's Python runs, from its first block to its last, in a separate process."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from tests.forks import Forks

ROOT = Path(__file__).resolve().parents[2]
PARTS = re.compile(r"^#+ (?P<heading>[^\n]*)$|^ *```(?P<language>\w*)\n(?P<block>.*?)^ *```", re.MULTILINE | re.DOTALL)
# What every page may use: a model to train, and a batch.
COMMON = """
import os, sys, torch
import te_dynamo
from te_dynamo import backend, runtime
from torch import nn

runtime.compile_inductor = runtime.compile_without_codegen
os.chdir(sys.argv[1])
torch.manual_seed(0)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down_proj, self.lm_head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.lm_head(self.down_proj(torch.relu(self.up(x))))

model, x = Model(), torch.randn(16, 32)
"""
LLAMA = """
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, Trainer, TrainingArguments, pipeline
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
def tiny(cls):
    return cls(LlamaConfig(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=2, num_labels=2))
"""
TRAINER = """
model = tiny(LlamaForSequenceClassification)
train = test = [{"input_ids": [3 + i % 7] * 8, "label": i % 2} for i in range(8)]
args = TrainingArguments("out", max_steps=2, save_steps=1, per_device_train_batch_size=4, report_to=[], disable_tqdm=True, use_cpu=True)
"""
# What else a page, or a section of it, needs: its heading -> code that runs before its first block; "" for the whole page.
NEEDS: dict[str, dict[str, str]] = {
    "README.md": {},
    "docs/index.md": {},
    "docs/options.md": {},
    "docs/attention.md": {},
    "docs/recipes.md": {},
    "docs/checkpoints.md": {"": "model.compile(backend='te_fp8'); model(x).sum().backward()"},
    "docs/debugging.md": {},
    "docs/memory.md": {},
    "docs/memory-and-speed.md": {"": LLAMA + "model = tiny(LlamaForCausalLM)"},
    "docs/distributed.md": {
        "": LLAMA
        + """
import torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store", rank=0, world_size=1)
model, group, folder = tiny(LlamaForCausalLM), dist.group.WORLD, "checkpoint"
""",
        "Checkpoints": """
optimizer = torch.optim.AdamW(model.parameters())
model(input_ids=torch.ones(2, 8, dtype=torch.long)).logits.sum().backward()
""",
    },
    "docs/huggingface.md": {
        "": LLAMA + TRAINER,
        "You compile the model yourself": TRAINER,
        "generate": "model, inputs = tiny(LlamaForCausalLM).eval(), {'input_ids': torch.ones(1, 8, dtype=torch.long)}",
        "Pipelines": """
class Tokenizer: ...
tokenizer, model = Tokenizer(), tiny(LlamaForSequenceClassification)
class Pipe:
    def __init__(self, task, model, tokenizer): self.model = model
pipeline = Pipe  # a real one needs a real tokenizer
""",
        "PEFT: LoRA and DoRA": """
from peft import LoraConfig, PeftModel, get_peft_model
class AutoModelForCausalLM:
    from_pretrained = staticmethod(lambda name: tiny(LlamaForCausalLM))
name = "tiny"
""",
    },
    "docs/accelerate.md": {
        "": LLAMA
        + """
optimizer = torch.optim.AdamW(model.parameters())
data, schedule = torch.utils.data.DataLoader([x]), torch.optim.lr_scheduler.ConstantLR(optimizer)
""",
        "By name": "from accelerate.state import AcceleratorState, GradientState, PartialState\n"
        "for state in (AcceleratorState, GradientState, PartialState): state._reset_state()",
    },
    "docs/estimate.md": {
        "": """
import inspect
args = (x,)
signature = inspect.signature(te_dynamo.estimate)
te_dynamo.estimate = lambda *given, **named: signature.bind(*given, **named)  # tests/lab has the real one, which takes its time
""",
    },
    "docs/migrating.md": {
        "": LLAMA
        + """
torch.save({"up._extra_state": torch.tensor([], dtype=torch.uint8)}, "te_checkpoint.pt")
llama = tiny(LlamaForCausalLM)
names = {
    "input_layernorm": "self_attention.layernorm_qkv.layer_norm", "self_attn.q_proj": "self_attention.layernorm_qkv.query",
    "self_attn.k_proj": "self_attention.layernorm_qkv.key", "self_attn.v_proj": "self_attention.layernorm_qkv.value",
    "self_attn.o_proj": "self_attention.proj.", "post_attention_layernorm": "layernorm_mlp.layer_norm",
    "mlp.down_proj": "layernorm_mlp.fc2",
}
source = tiny(LlamaForCausalLM).state_dict()
te_llama_state_dict = {"model.layers.0.self_attention._extra_state": None}
for name, tensor in source.items():
    inside = name.removeprefix("model.layers.0.").removesuffix(".weight")
    if inside in names:
        te_llama_state_dict["model.layers.0." + (names[inside] + "_weight").replace("._", ".")] = tensor
    elif "gate_proj" not in inside and "up_proj" not in inside:
        te_llama_state_dict[name] = tensor
mlp = [source[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up")]
te_llama_state_dict["model.layers.0.layernorm_mlp.fc1_weight"] = torch.cat(mlp)
"""
    },
}
# What must hold at the end.
HOLDS = {
    "docs/index.md": "assert te_dynamo.scale_state(model).sites() == ['up', 'down'] and y.shape == (512, 256)",
    "docs/checkpoints.md": "assert te_dynamo.scale_state(model).state_dict()['up.input.amax_history'].count_nonzero() == 0",
    "docs/debugging.md": "assert report.fp8_flop_fraction > 0.5 and sorted(os.listdir('dump/graph_0'))[0] == '0_dynamo.py'",
    "docs/distributed.md": "assert len(state['scales']) > 7; dist.destroy_process_group()",
    "docs/huggingface.md": "assert os.path.exists('out/checkpoint-2/scale_state.safetensors') and os.path.exists('adapters/state.pt')",
    "docs/migrating.md": "assert all(torch.equal(tensor, source[name]) for name, tensor in llama.state_dict().items())",
}


def blocks_of(page: str) -> list[tuple[str, str]]:
    """The Python of a page: (the heading above the block, the block)."""
    found, heading = [], ""
    for part in PARTS.finditer((ROOT / page).read_text()):
        if part["heading"] is not None:
            heading = part["heading"]
        elif part["language"] == "python":
            found.append((heading, textwrap.dedent(part["block"])))
    return found


def program(page: str) -> str:
    needs, parts = dict(NEEDS[page]), [COMMON, NEEDS[page].get("", "")]
    for heading, block in blocks_of(page):
        parts += [needs.pop(heading, ""), block]
    assert set(needs) <= {""}, f"{page} has no Python under {', '.join(needs)}"
    return "\n".join([*parts, HOLDS.get(page, "")])


def test_every_page_with_python_is_run():
    pages = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
    assert {page for page in pages if blocks_of(page)} == set(NEEDS)


@pytest.mark.parametrize("page", NEEDS)
def test_a_page_s_python_runs(page: str, hf_forks: Forks, tmp_path: Path) -> None:
    if "from peft" in program(page):
        pytest.importorskip("peft", reason="needs peft: pip install -e .[peft]")
    hf_forks.run(program(page), str(tmp_path))
