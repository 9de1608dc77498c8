"""The CUDA kernels in the watched build of the execution model (emulated.py).

The watch (cuda_model/watch.h) sees each access to memory: the kernels must order all accesses, and must fence what bulk
copies overwrite. The build also fuses products and sums, as a GPU's compiler does: the results must be as right.
"""

import chips
import emulated
import pytest
import test_close
import test_rows_cuda
import test_sinkhorn_cuda
import test_topk_cuda
import test_uld
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, logits, row_options
from test_rows import check
from truth import DIVERGENCES

from kdkernels.backends import native
from kdkernels.losses.options import STATISTICS

pytestmark = pytest.mark.skipif(emulated.missing_because is not None, reason=str(emulated.missing_because))
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the inputs would be on the GPU")


@pytest.fixture
def watched():
    with chips.watched():
        yield


# ---- the kernels are right


def test_kernels_without_a_fault_pass():
    model = emulated.cuda_model(watched=True)
    assert test_rows_cuda.wrong_result(model, seeds=8) is None
    assert test_rows_cuda.wrong_in_place(model, seeds=4) is None
    assert test_rows_cuda.wrong_softcaps(model) == 0
    assert test_topk_cuda.wrong_result(model) is None
    assert test_sinkhorn_cuda.wrong_result(model) is None


ONE_OF_EACH = {divergence.name: divergence for divergence in DIVERGENCES}


@on_a_cpu
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_small_divergences_keep_their_digits(name, watched):
    test_close.test_small_divergences_keep_their_digits(ONE_OF_EACH[name], "cuda")


@on_a_cpu
def test_rows_match_fp64(watched):
    @settings(max_examples=12)
    @given(recipe=logits(), recipe_of_options=row_options, divergence=st.sampled_from(DIVERGENCES))
    def property_holds(recipe, recipe_of_options, divergence):
        options = recipe_of_options.make(recipe.leading, recipe.vocab)
        check(recipe, options, divergence, "cuda", STATISTICS if "labels" in options else ())

    property_holds()


@on_a_cpu
def test_uld_matches_fp64(watched):
    with chips.on("small"):
        test_uld.test_every_backend_is_right("cuda")


# ---- the tests of the tests: a kernel with one fault must fail

# (the fault, its text in csrc/cuda, the replacement, the family). No order of threads makes any of these a wrong result
# in the plain build.
FAULTS = [
    ("no fence hands a row's bytes to the next row's copy",
     "      bulk_fence();\n      __syncthreads();  // all threads have read the staged row\n",
     "      __syncthreads();\n", "rows"),
    ("a block reads what another block of its cluster wrote to global memory",
     "    gradient.slope_sum = finite_or_nan(sums.psi);\n",
     "    cluster_sync(team.blocks);\n"
     "    gradient.slope_sum = finite_or_nan(load((const float*)call.sums + call.rows + row));\n", "rows"),
    ("no fence hands a sparse teacher's row to the next row's copy",
     "student, names);\n      bulk_fence();\n", "student, names);\n", "topk_rows"),
    ("no fence shows a barrier's initialisation to bulk copies",
     "bulk_barrier_init(&board.arrived);\n      bulk_barrier_init_fence();\n", "bulk_barrier_init(&board.arrived);\n",
     "topk_rows"),
    ("no fence shows a barrier's initialisation to other blocks",
     "bulk_barrier_init(&barrier);\n      bulk_barrier_init_fence();\n", "bulk_barrier_init(&barrier);\n", "topk_rows"),
    ("lanes of a warp wait at two cluster barriers",
     "    cluster_sync(blocks);\n  }\n",
     "    if (threadIdx.x % kWarp) cluster_sync(blocks); else\n cluster_sync(blocks);\n  }\n", "topk_rows"),
    ("lanes of a warp merge in two places", "  sums = team.merged(sums);\n  sums.phi +=",
     "  if (threadIdx.x % kWarp) sums = team.merged(sums);\n  else sums = team.merged(sums);\n  sums.phi +=",
     "topk_rows"),
    ("a block's last store rewrites the next block's first element",
     "    store_group<false>(x + first * bytes_of(dtype), dtype, slice.whole(0), 0, begin, end, values);\n",
     "    store_group<false>(x + first * bytes_of(dtype), dtype, slice.whole(0), 0, begin, end, values);\n"
     "    char* group = x + first * bytes_of(dtype);\n"
     "    if (threadIdx.x + 1 == kThreads && first + end < count)\n"
     "      store_logit(group, dtype, end, load_logit(group, dtype, end));\n", "linear"),
]  # fmt: skip


def wrong_sparse(module) -> int:
    """The number of calls against a sparse teacher that end in an error of the model."""
    wrong = 0
    for seed, chip in enumerate(("small", "single", "wide")):
        recipe = test_topk_cuda.Recipe(1000, 60, DTYPES[seed], 1, 7, labels=True, hard_weight=0.5, seed=seed)
        call = recipe.make()
        problem = call.problem(DIVERGENCES[0], call.student)
        with emulated.serving(module, module.configure_device(**chips.CHIPS[chip]), seed):
            try:
                native.cuda.topk_rows(problem, True, None)
            except RuntimeError as error:
                assert "CUDA model" in str(error), error
                wrong += 1
    return wrong


WRONG = {
    "rows": lambda module: test_rows_cuda.wrong_result(module, seeds=4),
    "topk_rows": wrong_sparse,
    "linear": test_rows_cuda.wrong_softcaps,
}


@pytest.mark.parametrize(("what", "text", "instead", "family"), FAULTS, ids=[what for what, *_ in FAULTS])
def test_a_fault_is_caught(what, text, instead, family):
    caught = WRONG[family](emulated.mutated(text, instead, family, watched=True))
    print(f"{what}: {caught} calls")
    assert caught, what


def test_the_calls_that_catch_faults_pass_without_one():
    model = emulated.cuda_model(watched=True)
    assert wrong_sparse(model) == 0
