"""The CUDA kernels beyond the tests of every backend: launch configurations, races, wide rows, errors.

Without a GPU every test runs in the execution model of CUDA (cuda_model/), on chips of chips.py.
"""

import chips
import emulated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, Logits, logits, row_options
from truth import DIVERGENCES, assert_gradient_close, assert_loss_close, rounding, run, truth

from kdkernels import fused_js, fused_kl, info
from kdkernels.backends import native
from kdkernels.families.options import RowOptions
from kdkernels.families.rows import Rows
from kdkernels.families.topk import Entries, TopkRows
from kdkernels.losses.options import STATISTICS

pytestmark = pytest.mark.skipif(emulated.missing_because is not None, reason=str(emulated.missing_because))


def launches_of(call, chip: str, seed: int = 0) -> list[dict]:
    """Without the launches of the kernel of close rows, each of which follows one for all rows."""
    with chips.on(chip, seed) as model:
        model.clear_launches()
        call()
        return model.launches()[::2]


# ---- wide rows


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize(
    ("vocab", "dtypes"),
    [(128_256, ("bfloat16", "bfloat16")), (200_003, ("bfloat16", "float32"))],
    ids=["aligned", "odd, mixed"],
)
def test_wide_rows_on_an_h100(divergence, vocab, dtypes):
    student_dtype, teacher_dtype = (getattr(torch, name) for name in dtypes)
    recipe = Logits((2,), vocab, (0, 0), student_dtype, teacher_dtype, 2.0, 0.0, 0.0, False, 7)
    student, teacher = recipe.make()
    options = {"temperature": 1.5, "labels": torch.tensor([vocab - 1, 3]), "hard_weight": 0.3}
    options["statistics"] = STATISTICS
    with chips.on("h100"):
        got = run(student, teacher, divergence, backend="cuda", **options)
    want = truth(student, teacher, divergence, **options)
    ulps = rounding(student, teacher, 1.5)
    assert_loss_close(got.loss, want.loss, 1e-6 * want.loss.abs() + ulps * (1 + want.loss.abs()), divergence)
    assert_gradient_close(got.gradient, want.gradient, ulps * (1 + want.loss.abs()), divergence)
    for name in STATISTICS:
        value = want.statistics[name].double()
        assert_loss_close(got.statistics[name], value, 1e-6 * value.abs() + ulps * (1 + value.abs()), name)


# ---- launch configurations: the design's values for an H100 with 227 KiB per block


@pytest.mark.parametrize(
    ("vocab", "dtype", "cluster", "threads", "shared", "held"),
    [
        (1000, torch.bfloat16, 1, 32, 4096, 45),
        (32_000, torch.bfloat16, 2, 256, 64_448, 3),
        (128_256, torch.bfloat16, 8, 256, 64_960, 3),
        (151_936, torch.bfloat16, 8, 256, 76_800, 3),
        (32_000, torch.float32, 4, 128, 64_448, 3),
        (128_256, torch.float32, 16, 128, 65_344, 3),
        (151_936, torch.float32, 16, 256, 77_312, 2),
        (262_144, torch.bfloat16, 16, 256, 66_880, 3),
        (262_144, torch.float32, 16, 512, 132_672, 1),
    ],
)
def test_a_row_is_held_by_the_smallest_cluster_that_leaves_room_for_another(
    vocab, dtype, cluster, threads, shared, held
):
    """The last number: the blocks whose shared memory a multiprocessor has. A block alone has twice the threads."""
    student, teacher = torch.zeros(1, vocab, dtype=dtype), torch.zeros(1, vocab, dtype=dtype)
    (launch,) = launches_of(lambda: fused_kl(student, teacher, backend="cuda"), "h100")
    assert (launch["cluster"], launch["block"][0], launch["shared"]) == (cluster, threads, shared)
    of_multiprocessor, taken_of_each = 228 * 1024, 1024
    assert of_multiprocessor // (shared + taken_of_each) == held


def test_without_clusters_rows_are_streamed():
    """Rows are streamed before sm_90, if no cluster holds a row, and if the call has only one sweep."""
    student, teacher = torch.randn(4, 3000, requires_grad=True), torch.randn(4, 3000)
    for chip in ("a100", "streaming"):
        (launch,) = launches_of(lambda: fused_js(student, teacher.detach(), backend="cuda").detach(), chip)
        assert launch["shared"] < 1000, chip
        assert (launch["cluster"] == 1) == (chip == "a100")
    sweep_alone = launches_of(
        lambda: fused_kl(student, teacher, gradient="backward", backend="cuda").backward(), "h100"
    )
    assert [launch["shared"] < 1000 for launch in sweep_alone] == [False, True]


def test_kernels_that_a_driver_made_of_older_ptx_use_no_clusters():
    """With KDKERNELS_CUDA_ARCHS="80+PTX", code compiled for sm_80 runs on a Hopper; it must launch without clusters."""
    device = emulated.cuda_model().configure_device(ptx_version=80)
    student, teacher = torch.randn(4, 3000), torch.randn(4, 3000)
    with emulated.serving(device=device) as serving:
        serving.clear_launches()
        fused_js(student, teacher, backend="cuda")
        launches = serving.launches()
    assert all(launch["cluster"] == 1 and launch["shared"] < 1000 for launch in launches)


def test_rows_in_flight_fit_the_cache_that_is_swept_again():
    """If rows are swept twice, a chip must process only as many rows at a time as the L2 cache holds."""
    student, teacher = torch.randn(64, 400), torch.randn(64, 400)
    model = emulated.cuda_model()
    rows = {}
    for l2_bytes in (40_000, 10_000_000):
        device = model.configure_device(major=8, multiprocessors=20, l2_bytes=l2_bytes)
        with emulated.serving(device=device) as serving:
            serving.clear_launches()
            fused_kl(student, teacher, backend="cuda")
            rows[l2_bytes] = serving.launches()[0]["grid"][0]
    assert rows == {40_000: 20, 10_000_000: 64}


@pytest.mark.parametrize(
    ("plan", "dtype", "way", "cluster", "threads"),
    [
        ("streaming,1,32", torch.float32, "streaming", 1, 32),
        ("streaming,4,64", torch.bfloat16, "streaming", 4, 64),
        ("staged,2,512", torch.float32, "staged", 2, 512),
        ("staged,4,64", torch.bfloat16, "staged", 4, 64),
        ("halves,16,32", torch.bfloat16, "halves", 16, 32),
    ],
)
def test_a_plan_can_be_forced(monkeypatch, plan, dtype, way, cluster, threads):
    student, teacher = torch.randn(3, 1000).to(dtype).requires_grad_(), torch.randn(3, 1000).to(dtype)
    want = truth(student, teacher, "js")
    monkeypatch.setenv("KDKERNELS_PLAN", plan)
    with chips.on("h100"):
        launch, close = info.launches(lambda: fused_js(student, teacher, backend="cuda"))
        got = run(student, teacher, "js", backend="cuda", gradient="forward")
    assert (launch["kernel"], launch["way"]) == ("cuda_rows", way)
    assert (launch["cluster"], launch["threads"]) == (cluster, threads)
    assert close["way"] == "streaming" and close["cluster"] == 1, "the kernel of close rows has its own plan"
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-5, atol=1e-6)
    rounded = 1e-5 if dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(got.gradient.double(), want.gradient, rtol=rounded, atol=1e-7)


@pytest.mark.parametrize(
    ("plan", "chip", "why"),
    [
        ("nonsense,0,0", "h100", "expected WAY,BLOCKS,THREADS"),
        ("staged,3,64", "h100", "a power of 2 up to 16"),
        ("staged,4", "h100", "expected WAY,BLOCKS,THREADS"),
        ("staged,4,64,1", "h100", "expected WAY,BLOCKS,THREADS"),
        ("staged,4,1024", "h100", "from 32 to 512"),
        ("streaming,16,64", "h100", "up to 8 blocks"),
        ("halves,1,64", "h100", "not of one 16-bit dtype"),
        ("staged,1,64", "a100", "no clusters and no bulk copies"),
        ("staged,16,64", "portable", "no room for a cluster"),
        ("staged,1,64", "small", "no room for a cluster"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(monkeypatch, plan, chip, why):
    x = torch.randn(3, 1000)
    monkeypatch.setenv("KDKERNELS_PLAN", plan)
    with chips.on(chip), pytest.raises(RuntimeError, match=f"KDKERNELS_PLAN={plan}: .*{why}"):
        fused_js(x, x, backend="cuda")


def test_a_report_of_the_plans():
    with chips.on("h100"):
        of_bf16, of_fp32 = info.plan_lines("cpu")
    assert of_bf16[0] == "plan, bfloat16"
    assert of_bf16[1].startswith("halves, clusters of 8, 256 threads and 76,800 bytes a block")
    assert of_fp32[1].startswith("staged, clusters of 16, 256 threads")
    assert info.plan_lines() == [] or torch.cuda.is_available()


# ---- races: the result must be bitwise the same for every order of the threads


@pytest.mark.parametrize("chip", [name for name in chips.CHIPS if name != "h100"])
def test_no_result_depends_on_the_order_of_threads(chip):
    @settings(max_examples=12)
    @given(
        recipe=logits(st.integers(1, 1500)), recipe_of_options=row_options, divergence=st.sampled_from(DIVERGENCES),
        seed=st.integers(0, 2**32 - 1), gradient=st.sampled_from(["forward", "backward"]),
    )  # fmt: skip
    def property_holds(recipe, recipe_of_options, divergence, seed, gradient):
        student, teacher = recipe.make()
        options = {**recipe_of_options.make(recipe.leading, recipe.vocab), "vocab_size": recipe.vocab_size}
        if "labels" in options:
            options["statistics"] = STATISTICS
        results = []
        for order in (seed, seed + 1):
            with chips.on(chip, order):
                results.append(run(student, teacher, divergence, backend="cuda", gradient=gradient, **options))
        first, second = results
        torch.testing.assert_close(first.loss, second.loss, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(first.gradient, second.gradient, rtol=0, atol=0, equal_nan=True)
        for name, value in first.statistics.items():
            torch.testing.assert_close(value, second.statistics[name], rtol=0, atol=0, equal_nan=True)

    property_holds()


# ---- the tests of the tests: a kernel with one fault must fail

# (the fault, its text in csrc/cuda, the replacement)
FAULTS = [
    ("partial results are read before the warps have written them",
     "slots_of_warps()[warp].put(x);\n    __syncthreads();", "slots_of_warps()[warp].put(x);"),
    ("the team's result is read before it is written",
     "    __syncthreads();\n    return board.of_team", "    return board.of_team"),
    ("a block reads the partial results before all have come",
     "    bulk_barrier_wait(barrier, parity);\n    return slots;", "    return slots;"),
    ("a block waits for fewer partial results than come", "blocks * kParts * 16", "(blocks - 1) * kParts * 16"),
    ("a fast block's next partial result counts as one of this merge",
     "turn = merges % 2, parity = merges / 2 % 2;", "turn = 0, parity = merges % 2;"),
    ("a block sends before the barriers of the others are initialised", "    cluster_sync(blocks);\n  }", "  }"),
    ("a row is staged over a row that is still read",
     "      __syncthreads();  // all threads have read the staged row\n",
     ""),
    ("a row is read before all of it is staged",
     "    }\n    __syncthreads();\n  }\n\n  // One thread calls this.", "    }\n  }\n\n  // One thread calls this."),
    ("a bulk copy is not waited for", "      bulk_barrier_wait(&board.arrived, parity);\n", ""),
    ("a bulk copy is waited for in the previous phase",
     "bulk_barrier_wait(&board.arrived, parity);", "bulk_barrier_wait(&board.arrived, parity ^ 1);"),
    ("the phase of a bulk copy is not counted", "      parity ^= 1;\n", ""),
    ("a barrier for bulk copies is used before it is initialised",
     "bulk_barrier_init_fence();\n    }\n    __syncthreads();", "bulk_barrier_init_fence();\n    }"),
    ("fewer bytes are copied than expected",
     "in_bulk, &board.arrived);", "in_bulk - 16, &board.arrived);"),
    ("the column after the last is read",
     "return position >= begin && position < end; }", "return position >= begin && position <= end; }"),
    ("a group past the end is loaded whole",
     "{ return aligned && position >= begin && position + kGroup <= end; }",
     "{ return aligned && position >= begin; }"),
    ("a group past the end is stored whole",
     "whole = aligned && position >= begin && position + kGroup <= end;", "whole = aligned && position >= begin;"),
    ("a group before the first column is stored whole",
     "whole = aligned && position >= begin && position + kGroup <= end;",
     "whole = aligned && position + kGroup <= end;"),
    ("a row's shift is ignored", "first_column = team.rank * plan.slice - shift;",
     "first_column = team.rank * plan.slice;"),
    ("rows that are shifted differently are taken for aligned",
     "return a_shift == b_shift ? a_shift : -1;", "return a_shift;"),
    ("the row after the last is processed",
     "row = blockIdx.x / plan.blocks; row < call.rows;", "row = blockIdx.x / plan.blocks; row <= call.rows;"),
    ("a row that is dropped is read", "return !skipped() && !bad(", "return !bad("),
    ("two blocks begin at the same column",
     "first_column = team.rank * plan.slice - shift;", "first_column = team.rank / 2 * plan.slice - shift;"),
    ("the label is looked for in the wrong block", "(int)numbers.label - first_column", "(int)numbers.label"),
]  # fmt: skip


def wrong_result(module, seeds: int) -> str | None:
    """The first chip and order of threads that end in an error of the model or in a wrong loss or gradient."""
    torch.manual_seed(0)
    for seed in range(seeds):
        vocab = (301, 3001, 64, 1000)[seed % 4]
        student, teacher = torch.randn(9, vocab), torch.randn(9, vocab)
        if seed % 2:
            student, teacher = student.half(), teacher.half()
        if seed % 8 == 5:  # the teacher's rows have another offset from a 16-byte boundary than the student's
            teacher = torch.nn.functional.pad(teacher, (1, 1))[:, 1:-1]
        mask = torch.rand(9) < 0.8
        options = {"mask": mask, "labels": torch.randint(0, vocab, (9,)), "hard_weight": 0.5}
        student[~mask], teacher[~mask] = torch.nan, torch.nan
        want = truth(student, teacher, "js", **options)
        for chip in ("small", "single", "wide", "streaming"):
            device = module.configure_device(**chips.CHIPS[chip])
            with emulated.serving(module, device, seed):
                try:
                    got = run(student, teacher, "js", backend="cuda", gradient="forward", **options)
                except RuntimeError as error:
                    assert "CUDA model" in str(error), error
                    return f"{chip}, seed {seed}: {error}"
            close = torch.allclose(got.loss.double(), want.loss, rtol=1e-4, atol=1e-5)
            scale = want.gradient.abs().max()
            if not (close and torch.allclose(got.gradient.double(), want.gradient, rtol=1e-2, atol=1e-4 * scale)):
                return f"{chip}, seed {seed}"
    return None


def test_kernels_without_a_fault_pass():
    assert wrong_result(emulated.cuda_model(), seeds=16) is None


@pytest.mark.parametrize(("what", "text", "instead"), FAULTS, ids=[what for what, _, _ in FAULTS])
def test_a_fault_is_caught(what, text, instead):
    module = emulated.mutated(text, instead, "rows")
    caught = wrong_result(module, seeds=8)
    print(f"{what}: {caught}")
    assert caught, what


# ---- the same tests for the in-place gradient and the soft cap

IN_PLACE_FAULTS = [
    ("the label's logit is read after its gradient may have replaced it", "floats[4], team.board.label_logit};",
     "floats[4], load_logit(row_start(call.student, call, row), call.student.dtype, numbers.label)};"),
    ("the label's logit is read after the merge, which other blocks may leave earlier",
     "    if (stores_label) team.board.label_logit = label_logit;\n    Floats x = team.merged(mine, at);",
     "    Floats x = team.merged(mine, at);\n    if (stores_label) team.board.label_logit = "
     "load_logit(row_start(call.student, call, row), call.student.dtype, numbers.label);"),
]  # fmt: skip


def wrong_in_place(module, seeds: int) -> str | None:
    """The first chip and order of threads in which in-place results differ from those with a separate gradient."""
    torch.manual_seed(0)
    for seed in range(seeds):
        vocab = (301, 3001, 64, 1000)[seed % 4]
        student, teacher = (torch.randn(1, 9, vocab + 3).to((torch.float32, torch.float16)[seed % 2]) for _ in range(2))
        labels, row_scale, half = torch.randint(0, vocab, (9,)), (torch.rand(9) < 0.8).float(), torch.full((1,), 0.5)
        student[0, row_scale == 0] = torch.nan
        options = RowOptions(row_scale, 2 * half, labels=labels, hard_weight=half)
        problem = Rows(student, teacher, options, "mixed_kl", half, vocab, seed % 8 > 3)
        for chip in ("small", "single", "wide", "streaming"):
            device, in_place = module.configure_device(**chips.CHIPS[chip]), student.clone()
            with emulated.serving(module, device, seed):
                fresh = native.cuda.rows(problem, True)
            with emulated.serving(module, device, seed + 1):
                found = native.cuda.rows(problem._replace(student=in_place), True, in_place)
            if not all(torch.equal(a, b) for a, b in zip(fresh, found, strict=True)):
                return f"{chip}, seed {seed}"
    return None


SOFTCAP_FAULTS = [
    ("memory before the tensor is capped", "first < 0 ? shift : 0,", "0,"),
    ("memory after the tensor is capped",
     "count - first < kGroup ? (int)(count - first) : kGroup);", "kGroup);"),
    ("groups ignore the tensor's offset",
     "threadIdx.x) * kGroup - shift;", "threadIdx.x) * kGroup;"),
    ("blocks process each other's groups",
     "(int64_t)gridDim.x * kThreads * kGroup;", "(int64_t)kThreads * kGroup;"),
    ("a block takes no second turn", "for (; first < count; first += step)", "if (first < count)"),
    ("two tensors are wrongly assumed to be aligned", "const bool aligned = shift >= 0;", "const bool aligned = true;"),
    ("a gradient of 0 meets a logit that is NaN", "return gradient == 0 ? gradient : gradient *", "return gradient *"),
    ("a small logit loses digits", "fabsf(ratio) >= 0x1p-12f ?", "fabsf(ratio) >= 0x1p-2f ?"),
]  # fmt: skip


def wrong_softcaps(module) -> int:
    """The number of tensors with a wrong result or an error of the model."""
    wrong = 0
    torch.manual_seed(0)
    for chip, dtype, count, begin, begin_of_logits in [
        ("single", torch.float32, 60_001, 0, 0), ("single", torch.float16, 50_000, 3, 3),
        ("small", torch.float32, 5, 1, 1), ("small", torch.float16, 4099, 5, 2),
        ("small", torch.float32, 2048, 0, 0), ("small", torch.float16, 7, 0, 0),
    ]:  # fmt: skip
        whole, logits = 20 * torch.randn(count + begin + 9), 20 * torch.randn(count + begin_of_logits)
        whole, logits = whole.to(dtype), (30 * torch.tanh(logits / 30)).to(dtype)[begin_of_logits:]
        gradient = torch.randn(whole.shape).to(dtype)
        gradient[::7], logits[begin % 7 and 7 - begin % 7 :: 7] = 0, torch.nan
        part = slice(begin, begin + count)
        want, want_gradient = whole.double(), gradient.double()
        want[part] = 30 * torch.tanh(want[part] / 30)
        slope = 1 - (logits.double() / 30) ** 2
        want_gradient[part] = torch.where(want_gradient[part] == 0, 0, want_gradient[part] * slope)
        device = module.configure_device(**chips.CHIPS[chip])
        with emulated.serving(module, device, count):
            try:
                native.cuda.softcap_(whole[part], 30.0)
                native.cuda.softcap_gradient_(gradient[part], logits, 30.0)
            except RuntimeError as error:
                assert "CUDA model" in str(error), error
                wrong += 1
                continue
        eps = torch.finfo(dtype).eps
        for got, right in ((whole, want), (gradient, want_gradient)):
            wrong += not torch.allclose(got.double(), right, rtol=eps + 1e-6, atol=1e-7)
    return wrong


def test_kernels_without_a_fault_pass_in_place_and_capped():
    assert wrong_in_place(emulated.cuda_model(), seeds=16) is None
    assert wrong_softcaps(emulated.cuda_model()) == 0


@pytest.mark.parametrize(("what", "text", "instead"), IN_PLACE_FAULTS, ids=[what for what, _, _ in IN_PLACE_FAULTS])
def test_a_fault_in_place_is_caught(what, text, instead):
    caught = wrong_in_place(emulated.mutated(text, instead, "rows"), seeds=8)
    print(f"{what}: {caught}")
    assert caught, what


@pytest.mark.parametrize(("what", "text", "instead"), SOFTCAP_FAULTS, ids=[what for what, _, _ in SOFTCAP_FAULTS])
def test_a_fault_of_the_soft_cap_is_caught(what, text, instead):
    caught = wrong_softcaps(emulated.mutated(text, instead, "linear"))
    print(f"{what}: {caught} of 12 results")
    assert caught, what


# ---- addresses


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_rows_that_are_not_aligned(dtype, offset):
    """Views that are not 16-byte aligned, and rows of odd width, must give the results of their aligned copies."""
    student, teacher = torch.randn(5, 331).to(dtype), torch.randn(5, 340).to(dtype)
    for chip in ("small", "streaming", "a100"):
        with chips.on(chip):
            got = run(student[:, offset:325], teacher[:, offset:325], "js", backend="cuda")
            aligned = [torch.zeros(5, 344).to(dtype) for _ in range(2)]
            for whole, x in zip(aligned, (student, teacher), strict=True):
                whole[:, : 325 - offset] = x[:, offset:325]
            want = run(*aligned, "js", vocab_size=325 - offset, backend="cuda")
        # The columns that a thread sums depend on the row's alignment.
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=2e-6)
        scale = want.gradient.float().abs().max().item()
        ulp = torch.finfo(dtype).eps
        torch.testing.assert_close(got.gradient, want.gradient[:, : 325 - offset], rtol=2 * ulp, atol=1e-6 * scale)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_an_infinite_scale_without_a_label_term_is_as_on_the_cpu(labelled, sparse):
    """inf * 0 is NaN, so a hard weight of 0 must leave the label term out."""
    student, teacher = torch.randn(1, 3, 60), torch.randn(1, 3, 60)
    row_scale, ones = torch.tensor([torch.inf, 1.0, -torch.inf]), torch.ones(1)
    labels, hard_weight = (torch.tensor([4, 5, 6]), torch.zeros(1)) if labelled else (None, None)
    loss_terms = (RowOptions(row_scale, ones, labels=labels, hard_weight=hard_weight), "kl", ones, 60, True)

    def results(kernels):
        if not sparse:
            return kernels.rows(Rows(student, teacher, *loss_terms), True)[:2]
        log_probs, indices = teacher[0].log_softmax(-1)[:, :9], torch.arange(9, dtype=torch.int32).expand(3, 9)
        tail = teacher[0].log_softmax(-1)[:, 9:].logsumexp(-1)
        entries = Entries(indices.contiguous(), log_probs.contiguous(), tail)
        return kernels.topk_rows(TopkRows(student, entries, *loss_terms, support_only=False), True)[:2]

    want = results(native.cpu)
    with chips.on("small"):
        got = results(native.cuda)
    assert want[1][0, [0, 2]].isinf().all(), "every class of these rows must have an infinite gradient"
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(b, a)


# ---- errors


@pytest.mark.parametrize(
    ("call", "error", "advice"),
    [
        ("cudaLaunchKernelEx", "cudaErrorLaunchOutOfResources", "another backend"),
        ("cudaLaunchKernelEx", "cudaErrorNoKernelImageForDevice", "KDKERNELS_CUDA_ARCHS"),
        ("cudaDeviceGetAttribute", "cudaErrorInvalidDevice", "another backend"),
        ("cudaSetDevice", "cudaErrorInvalidDevice", "another backend"),
        ("cudaGetDevice", "cudaErrorInsufficientDriver", "older than the CUDA"),
    ],
)
def test_an_error_of_cuda_names_the_call_and_what_to_do(call, error, advice):
    student, teacher = torch.randn(3, 100), torch.randn(3, 100)
    with chips.on("small") as model:
        want = fused_kl(student, teacher, backend="cuda")
        model.fail_call(call, error)
        try:
            with pytest.raises(RuntimeError, match=rf"{call}: .*{error}.*{advice}"):
                fused_kl(student, teacher, backend="cuda")
        finally:
            model.fail_call(call, "cudaSuccess")
        assert torch.equal(fused_kl(student, teacher, backend="cuda"), want), "a later call must succeed"
        assert model.current_device() == 0


def test_a_launch_of_the_soft_cap_that_fails_is_an_error():
    with chips.on("small") as model:
        for call in ("cudaLaunchKernelEx", "cudaSetDevice", "cudaDeviceGetAttribute"):
            model.fail_call(call, "cudaErrorInvalidDevice")
            try:
                with pytest.raises(RuntimeError, match=rf"{call}: .*cudaErrorInvalidDevice"):
                    native.cuda.softcap_(torch.randn(9), 30.0)
                with pytest.raises(RuntimeError, match=rf"{call}: .*cudaErrorInvalidDevice"):
                    native.cuda.softcap_gradient_(torch.randn(9), torch.randn(9), 30.0)
            finally:
                model.fail_call(call, "cudaSuccess")
        model.clear_launches()
        native.cuda.softcap_(torch.randn(0, 7), 30.0)
        native.cuda.softcap_gradient_(torch.randn(3, 0), torch.randn(3, 0), 30.0)
        assert not model.launches(), "an empty tensor must launch nothing"
        native.cuda.softcap_(torch.randn(100_000), 30.0)
        (launch,) = model.launches()
        assert launch["block"][0] * 8 * (launch["grid"][0] - 1) <= 100_000, "every block must have a group"


@pytest.mark.parametrize(
    ("call", "error", "reason"),
    [
        ("cudaGetDeviceCount", "cudaErrorNoDevice", "cudaErrorNoDevice"),
        ("cudaGetDeviceCount", "cudaErrorInsufficientDriver", "it is older"),
        ("cudaFuncGetAttributes", "cudaErrorNoKernelImageForDevice", "KDKERNELS_CUDA_ARCHS"),
    ],
)
def test_a_chip_that_is_not_served_is_refused_with_a_reason(call, error, reason):
    x = torch.randn(2, 10)
    with chips.on("small") as model:
        model.fail_call(call, error)
        native._asked_once.cache_clear()
        try:
            with pytest.raises(RuntimeError, match=f"backend 'cuda' cannot serve this call: .*{reason}"):
                fused_kl(x, x, backend="cuda")
        finally:
            model.fail_call(call, "cudaSuccess")
            native._asked_once.cache_clear()
