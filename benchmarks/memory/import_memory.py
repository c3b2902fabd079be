"""Peak memory of loading a published checkpoint: generates one of 2 GB and loads it in a child process.

    python -m benchmarks.memory.import_memory       # writes records/import_memory.json

The rule: anonymous memory, above that of the process before loading, is at most the wrapped decoder and its memory plus
1.3 times the largest tensor. Pages of the checkpoint's own files are not anonymous: the system can drop them any time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.records import ROOT, record_path, write
from mplus.environment import run_info
from mplus.interop import load_published

ALLOWED = 1.3
LAYERS, WIDTH, INNER, VOCABULARY, HEADS, KV_HEADS = 12, 2048, 5632, 32000, 32, 8
K, POOL_BLOCKS, LTM_BLOCKS, RETRIEVER, RANK = 128, 40, 10, 256, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj")
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "num_tokens": K,
    "num_blocks": POOL_BLOCKS + LTM_BLOCKS,
    "num_ltm_blocks": LTM_BLOCKS,
    "update_ltm_mode": "immediate",
    "update_ltm_frequency": 60,
    "initial_rf_when_moving_stm_to_ltm": 10,
    "decay_frequency": 1,
    "add_bos_embedding": True,
    "add_decoder_lora": True,
    "drop_memory_per_layer": True,
    "ltm_initial_size": K * POOL_BLOCKS,
    "selector_hidden_dim": RETRIEVER,
    "num_selector_layers": 2,
    "lora_config": {"r": RANK, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": list(TARGETS)},
}


def main() -> int:
    """Measure with the stored dtype and with a wider one; return 1 when the rule is broken."""
    with tempfile.TemporaryDirectory() as folder:
        size, largest = generate(Path(folder))
        runs = [measure(Path(folder), dtype, largest) for dtype in ("bfloat16", "float32")]
    record = {
        **run_info(),
        "checkpoint": {"bytes": size, "dtype": "bfloat16"},
        "allowed_over_target_in_largest_tensors": ALLOWED,
        "runs": runs,
    }
    write(record_path("memory", "import_memory"), record)
    print(json.dumps(record, indent=1))
    return 0 if all(run["over_target_in_largest_tensors"] <= ALLOWED for run in runs) else 1


def generate(folder: Path) -> tuple[int, int]:
    """Write the checkpoint, one shard per layer and one for the rest.

    Returns:
        Bytes of all tensors, and how many numbers the largest of them has.
    """
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    weight_map: dict[str, str] = {}
    size = largest = 0
    for number in range(LAYERS + 1):
        shapes = rest() if number == LAYERS else layer(number)
        tensors = {name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02) for name, shape in shapes.items()}
        for name in [name for name in tensors if name.startswith(("ltm_ages", "ltm_recall"))]:
            tensors[name] = torch.arange(len(tensors[name]), dtype=torch.float32)
        file = f"model-{number + 1:05}-of-{LAYERS + 1:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        size += sum(tensor.nbytes for tensor in tensors.values())
        largest = max(largest, *(tensor.numel() for tensor in tensors.values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return size, largest


def rest() -> dict[str, tuple[int, ...]]:
    """Return the shapes of what is not in a layer."""
    return {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "lm_head.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
        "memory": (LAYERS, K * POOL_BLOCKS, WIDTH),
        "bos_embedding": (LAYERS, 1, WIDTH),
        "new_memory_positional_emb": (1, 1, WIDTH),
    }


def layer(number: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one layer and its long-term memory."""
    path, narrow = f"model.layers.{number}", WIDTH * KV_HEADS // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        f"{path}.input_layernorm.weight": (WIDTH,),
        f"{path}.post_attention_layernorm.weight": (WIDTH,),
        f"{path}.self_attn.o_proj.weight": (WIDTH, WIDTH),
    }
    for name, out, into in (
        ("self_attn.q_proj", WIDTH, WIDTH),
        ("self_attn.k_proj", narrow, WIDTH),
        ("self_attn.v_proj", narrow, WIDTH),
        ("mlp.gate_proj", INNER, WIDTH),
        ("mlp.up_proj", INNER, WIDTH),
        ("mlp.down_proj", WIDTH, INNER),
    ):
        shapes[f"{path}.{name}.base_layer.weight"] = (out, into)
        for adapter in ("default", "decoder_adapter"):
            shapes[f"{path}.{name}.lora_A.{adapter}.weight"] = (RANK, into)
            shapes[f"{path}.{name}.lora_B.{adapter}.weight"] = (out, RANK)
    for projector in ("query_proj", "key_proj", "encoder_query_proj"):
        shapes[f"{path}.self_attn.{projector}.0.weight"] = (2 * RETRIEVER, WIDTH)
        shapes[f"{path}.self_attn.{projector}.2.weight"] = (RETRIEVER, 2 * RETRIEVER)
    rows = K * POOL_BLOCKS
    shapes[f"ltm.{number}"] = (rows, WIDTH)
    shapes[f"ltm_keys.{number}"] = (rows, RETRIEVER)
    shapes[f"ltm_ages.{number}"] = shapes[f"ltm_recall_frequencies.{number}"] = (rows,)
    return shapes


def load(folder: Path, dtype: str) -> None:
    """Run the child: say when everything is imported, wait for a line, load, print the bytes of what was made."""
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    model, memory = load_published(folder, dtype=getattr(torch, dtype))
    seconds = time.perf_counter() - started
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    lists = memory.states[0].row_lists().values()
    for rows in (rows for parts in lists for rows in parts):  # the short-term rows are those of the model's pool
        for column in rows.columns().values():
            storages[column.untyped_storage().data_ptr()] = column.untyped_storage().nbytes()
    print(json.dumps({"target_bytes": sum(storages.values()) + memory.stores[0].nbytes, "seconds": round(seconds, 1)}))


def measure(folder: Path, dtype: str, largest: int) -> dict[str, Any]:
    """Load in a child process and watch its anonymous memory."""
    command = [sys.executable, "-m", "benchmarks.memory.import_memory", str(folder), dtype]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as child:
        if child.stdin is None or child.stdout is None or child.stdout.readline() != "ready\n":
            raise RuntimeError(f"the loading process did not start: exit status {child.wait()}")
        before = peak = anonymous(child.pid)
        samples = 0
        child.stdin.write("\n")
        child.stdin.flush()
        while child.poll() is None:
            peak, samples = max(peak, anonymous(child.pid)), samples + 1
            time.sleep(0.001)
        if child.returncode:
            raise RuntimeError(f"loading failed with exit status {child.returncode}")
        made = json.loads(child.stdout.read())
    largest_bytes = largest * (4 if dtype == "float32" else 2)
    over = peak - before - made["target_bytes"]
    return {
        "dtype": dtype,
        "samples": samples,
        "before_bytes": before,
        "peak_bytes": peak,
        **made,
        "largest_tensor_bytes": largest_bytes,
        "over_target_bytes": over,
        "over_target_in_largest_tensors": round(over / largest_bytes, 3),
    }


def anonymous(pid: int) -> int:
    """Return the bytes of anonymous memory of a process (Linux); 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    line = next((line for line in status.splitlines() if line.startswith("RssAnon:")), None)
    return int(line.split()[1]) * 1024 if line is not None else 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        load(Path(sys.argv[1]), sys.argv[2])
    else:
        sys.exit(main())
