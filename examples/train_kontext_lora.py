"""A LoRA for FLUX.1 Kontext or FLUX.2, trained with random dropping of reference tokens.

    accelerate launch examples/train_kontext_lora.py --model PATH --data pairs --out lora

`pairs` holds pictures and ``metadata.jsonl``, one JSON object a line: ``{"reference": "cup.png", "prompt": "the cup on
a beach", "target": "cup-beach.png"}``; for FLUX.2 ``reference`` may be a list. Everything here is an ordinary script on
accelerate and peft; what makes it drop tokens is the one line with `patch_for_training`. Run it again to continue from
the newest checkpoint. The LoRA that comes out is for any loader, and its metadata say what it was trained with::

    pipe.load_lora_weights("lora")
    sra.patch(pipe, sra.SparseContext(0.25, "edges"))

With ``--isolate`` the references run by themselves instead, and the LoRA is for a cache that computes them once. Its
file says so, and a patch with a cache runs it so::

    pipe.load_lora_weights("lora")
    sra.patch(pipe)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

import sparse_ref_attn as sra
from sparse_ref_attn.eval.loading import load_pipeline
from sparse_ref_attn.models import adapter_for
from sparse_ref_attn.pictures import open_image
from sparse_ref_attn.training.isolate_references import said_of
from sparse_ref_attn.training.lora import lora_metadata

TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "to_qkv_mlp_proj",
]

KEEP = (0.1, 1.0)
Drop = sra.RandomDrop | sra.IsolateReferences


class Pair(NamedTuple):
    """One training example, encoded: what the transformer is given beside noise and time."""

    target: Tensor  # (N, D) packed latents
    references: Tensor  # (R, D)
    image_ids: Tensor  # (N + R, axes)
    text: dict[str, Tensor]  # the prompt, (L, ...) for each argument
    text_ids: Tensor  # (L, axes)


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``metadata.jsonl``: {"references": [path, ...], "target": path, "prompt": text}."""
    index = folder / "metadata.jsonl"
    if not index.is_file():
        raise sra.ConfigError(f"a folder of pairs must hold metadata.jsonl, got {folder}")
    pairs = []
    for number, line in enumerate(filter(None, map(str.strip, index.read_text().splitlines())), 1):
        try:
            entry = json.loads(line)
            given = entry["reference"]
            names = [given] if isinstance(given, str) else list(given)
            pair = {"references": [folder / name for name in names], "target": folder / entry["target"]}
            pairs.append(pair | {"prompt": str(entry["prompt"])})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise sra.ConfigError(
                f"{index}, entry {number} must be a JSON object with reference, target and prompt, got {line[:80]}"
            ) from error
    counts = {len(pair["references"]) for pair in pairs}
    if len(counts) != 1 or 0 in counts:
        raise sra.ConfigError(f"{index} must name pairs that all have as many references, one or more, got {counts}")
    return pairs


@torch.no_grad()
def encode(pipe: Any, pair: dict[str, Any], options: argparse.Namespace) -> Pair:
    """Latents and prompt of one pair, by the pipeline's own encoders."""
    adapter = adapter_for(pipe.transformer)
    axes = len(pipe.transformer.config.axes_dims_rope)
    frame = 10 if axes == 4 else 1  # what FLUX.2 and FLUX.1 Kontext add to the first position id for each reference

    def latents(path: Path, number: int) -> tuple[Tensor, Tensor]:
        picture = open_image(path).resize((options.side, options.side))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
        tokens, grid = adapter.encode(pipe, pixels.to(pipe.vae.device, pipe.vae.dtype))
        ids = torch.cartesian_prod(torch.tensor([frame * number]), *map(torch.arange, grid))
        return tokens[0].float().cpu(), torch.nn.functional.pad(ids, (0, axes - 3))

    tokens, ids = zip(*(latents(path, i) for i, path in enumerate([pair["target"], *pair["references"]])), strict=True)
    settings: dict[str, Any] = {"prompt": pair["prompt"], "max_sequence_length": options.text_tokens}
    if axes == 3:
        text, pooled, text_ids = pipe.encode_prompt(prompt_2=None, **settings)
        arguments = {"encoder_hidden_states": text[0].cpu(), "pooled_projections": pooled[0].cpu()}
    else:
        if options.text_layers:
            settings["text_encoder_out_layers"] = tuple(options.text_layers)
        text, text_ids = pipe.encode_prompt(**settings)
        arguments = {"encoder_hidden_states": text[0].cpu()}
        text_ids = text_ids[0]
    return Pair(tokens[0], torch.cat(tokens[1:]), torch.cat(ids), arguments, text_ids.cpu())


def loss_of(model: Any, pairs: list[Pair], guidance: float | None, draw: torch.Generator, device: Any) -> Tensor:
    """Flow matching: the mean squared error of the velocity, noise minus target."""
    target, references = (
        torch.stack(x).to(device) for x in zip(*((p.target, p.references) for p in pairs), strict=True)
    )
    sigma = torch.randn(len(pairs), generator=draw).sigmoid().to(device)
    noise = torch.randn(target.shape, generator=draw).to(device)
    noisy = torch.lerp(target, noise, sigma[:, None, None])
    text = {name: torch.stack([p.text[name] for p in pairs]).to(device) for name in pairs[0].text}
    if guidance is not None:
        text["guidance"] = sigma.new_full((len(pairs),), guidance)
    prediction = model(
        hidden_states=torch.cat([noisy, references], 1), img_ids=pairs[0].image_ids.to(device),
        txt_ids=pairs[0].text_ids.to(device), timestep=sigma, return_dict=False, **text,
    )[0][:, : target.shape[1]]  # fmt: skip
    return (prediction.float() - (noise - target)).square().mean()


def seeded(*numbers: int) -> np.random.Generator:
    return np.random.default_rng(numbers)


def chosen(count: int, size: int, step: int, rank: int, ranks: int, seed: int) -> list[int]:
    """Which examples a step of one process takes: each pass over them in an order of its own."""
    first = (step * ranks + rank) * size
    return [int(seeded(seed, i // count).permutation(count)[i % count]) for i in range(first, first + size)]


def newest(out: Path) -> tuple[int, Path | None]:
    """Steps and folder of the newest checkpoint."""
    found = {int(path.name.split("-")[1]): path for path in out.glob("checkpoint-*") if path.suffix != ".partial"}
    return max(found.items(), default=(0, None))


def save_checkpoint(accelerator: Accelerator, out: Path, step: int) -> None:
    """Whole or not at all: written beside its place, then moved there; older ones go."""
    partial = out / f"checkpoint-{step}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        older = [path for path in out.glob("checkpoint-*") if path != partial]
        partial.rename(partial.with_suffix(""))
        for path in older:
            shutil.rmtree(path)


def save_lora(transformer: Any, out: Path, drop: Drop, options: argparse.Namespace) -> Path:
    """Where ``pipe.load_lora_weights(out)`` finds it; the settings are in the file's metadata."""
    path = out / "pytorch_lora_weights.safetensors"
    state = get_peft_model_state_dict(transformer)
    tensors = {f"transformer.{name}": value.detach().cpu().contiguous() for name, value in state.items()}
    settings = {**said_of(drop), "steps": options.steps, "base_model": options.model}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, lora_metadata(transformer, settings))
    os.replace(partial, path)
    return path


def train(options: argparse.Namespace) -> Path:
    """Train, and return the LoRA's path."""
    pairs = read(options.data)
    drop: Drop = sra.RandomDrop(
        tuple(options.keep or KEEP), options.distribution, per_sample=options.per_sample,
        full_probability=options.full_probability, seed=options.seed,
    )  # fmt: skip
    if options.isolate is not None:
        drop = sra.IsolateReferences(options.isolate, drop=drop if options.keep else None)
    accelerator = Accelerator(
        mixed_precision=options.precision, gradient_accumulation_steps=1, cpu=options.device == "cpu"
    )
    pipe, _ = load_pipeline(options.model, device=str(accelerator.device), dtype=options.dtype)
    transformer = pipe.transformer
    if not isinstance(transformer, (FluxTransformer2DModel, Flux2Transformer2DModel)):
        raise sra.ConfigError(f"the model must be FLUX.1 Kontext or FLUX.2, got {type(pipe).__name__}")
    if isinstance(transformer, FluxTransformer2DModel) and len(pairs[0]["references"]) > 1:
        raise sra.ConfigError(f"FLUX.1 Kontext takes one reference a pair, got {len(pairs[0]['references'])}")
    encoded = [encode(pipe, pair, options) for pair in tqdm(pairs, desc="encode", disable=options.quiet)]
    for name in ("vae", "text_encoder", "text_encoder_2"):  # no longer needed: their memory is the transformer's
        if getattr(pipe, name, None) is not None:
            getattr(pipe, name).to("cpu")

    torch.manual_seed(options.seed)
    transformer.requires_grad_(False).train()
    transformer.add_adapter(LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=TARGETS))
    weights = [p for p in transformer.parameters() if p.requires_grad]
    for weight in weights:
        weight.data = weight.data.float()
    if options.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()

    handle = sra.patch_for_training(transformer, drop)
    accelerator.register_for_checkpointing(handle)
    model, optimizer = accelerator.prepare(transformer, torch.optim.AdamW(weights, lr=options.lr))
    start, found = newest(options.out)
    if found is not None:
        try:
            accelerator.load_state(str(found))
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise sra.ConfigError(f"{found} must be of this model and LoRA (or change --out): {reason}") from error

    guidance = options.guidance if getattr(transformer.config, "guidance_embeds", False) else None
    rank, ranks = accelerator.process_index, accelerator.num_processes
    bar = tqdm(range(start, options.steps), initial=start, total=options.steps, disable=options.quiet)
    for step in bar:
        batch = [encoded[i] for i in chosen(len(encoded), options.batch, step, rank, ranks, options.seed)]
        draw = torch.Generator().manual_seed(int(seeded(options.seed, step, rank).integers(2**63)))
        with accelerator.autocast():
            loss = loss_of(model, batch, guidance, draw, accelerator.device)
        if not bool(loss.detach().isfinite()):
            raise sra.NonFiniteError(f"the loss must be finite, got {loss.item()} in step {step}: try a lower --lr")
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        kept = sum(s.kept for s in handle.kept) / (sum(sum(s.sizes) for s in handle.kept) or 1)
        bar.set_postfix_str(f"loss {loss.item():.4f}, kept {kept:.0%}")
        if (step + 1) % options.checkpoint_every == 0 or step + 1 == options.steps:
            save_checkpoint(accelerator, options.out, step + 1)
    path = options.out / "pytorch_lora_weights.safetensors"
    if accelerator.is_main_process:
        save_lora(transformer, options.out, drop, options)
    handle.remove()
    accelerator.end_training()
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="directory or hub id of a FLUX.1 Kontext or FLUX.2 pipeline")
    add("--data", required=True, type=Path, help="folder with metadata.jsonl")
    add("--out", required=True, type=Path, help="folder for checkpoints and the LoRA")
    add("--steps", type=int, default=2000)
    add("--batch", type=int, default=1, help="pairs a step and process")
    add("--lr", type=float, default=1e-4)
    add("--rank", type=int, default=16, help="of the LoRA")
    add("--side", type=int, default=1024, help="pictures are resized to this height and width")
    add("--text-tokens", type=int, default=512, help="length of the prompts")
    add("--text-layers", type=int, nargs="*", help="FLUX.2: layers of the text encoder; default the pipeline's own")
    add("--keep", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="share of tokens kept (default: 0.1 1.0; with --isolate all are read)")  # fmt: skip
    add("--distribution", default="uniform", help="of the share: uniform, log_uniform or arcsine")
    add("--full-probability", type=float, default=0.1, help="share of the draws that keep every token")
    add("--per-sample", action="store_true", help="each item of a batch has a share of its own")
    add("--isolate", nargs="?", const="all", choices=("all", "reference"),
        help="references run by themselves, all together or each alone")  # fmt: skip
    add("--guidance", type=float, default=1.0, help="for a model with an embedding of it")
    add("--gradient-checkpointing", action="store_true")
    add("--precision", choices=("no", "bf16", "fp16"), default="no", help="accelerate's mixed precision")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="of the frozen weights")
    add("--device", choices=("auto", "cpu"), default="auto")
    add("--checkpoint-every", type=int, default=250, help="steps; a killed run loses at most these")
    add("--seed", type=int, default=0)
    add("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(argv)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        print(f"wrote {train(options)}")
    except (sra.SparseRefError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
