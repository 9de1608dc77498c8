"""The fp64 reference that every kernel is compared with, and the tolerances of the comparison."""

from dataclasses import dataclass

import torch

import kdkernels
from kdkernels import CATALOGUE, Divergence, selftest
from kdkernels.backends import refuse
from kdkernels.backends.reference.table import TABLE
from kdkernels.ops import Operator

DIVERGENCES = [example for name in CATALOGUE for example in Divergence.examples(name)]

# The compiled backends, and "reference" in low precision.
BACKENDS = ["cpu", "cuda", "triton", "reference"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def device_of(backend: str) -> str:
    return "cpu" if backend == "cpu" else DEVICE


def serves(backend: str, student: torch.Tensor, teacher: torch.Tensor) -> bool:
    return refuse(backend, student, teacher) is None


@dataclass
class Result:
    loss: torch.Tensor
    gradient: torch.Tensor | None
    statistics: dict[str, torch.Tensor]


def run(student, teacher, divergence, *, grad_output=None, statistics=(), **options) -> Result:
    """Loss and gradient of a call on fresh leaves. The reduction defaults to "none"."""
    options = {"reduction": "none", **options}
    student = student.detach().requires_grad_()
    out = kdkernels.fused_divergence(student, teacher.detach(), divergence, statistics=statistics, **options)
    loss, found = (out.loss, out.statistics) if statistics else (out, {})
    if grad_output is None:
        grad_output = torch.ones_like(loss)
    (gradient,) = torch.autograd.grad(loss, student, grad_output.to(loss))
    return Result(loss.detach(), gradient, found)


def truth(student, teacher, divergence, **options) -> Result:
    """The same call in fp64 on the reference backend."""
    options = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in options.items()
    }
    options.pop("gradient", None)
    return run(student.double(), teacher.double(), divergence, **{**options, "backend": "reference"})


def rounding(student, teacher, temperature=1.0) -> torch.Tensor:
    """The rounding error of each row: 4 ulp of its largest |lse| or |log-probability|.

    A log-probability's rounding error is relative to its own size, even if the lse is small. The size therefore
    includes the span from the lse down to the smallest logit that has mass in fp32.
    """
    largest = torch.ones(student.shape[:-1], dtype=torch.float64, device=student.device)
    for x in (student, teacher):
        tempered = x.double() / temperature
        lse = tempered.logsumexp(-1)
        finite = torch.where(torch.isfinite(tempered), tempered, lse[..., None])
        span = (lse - finite.min(-1).values).clamp(max=87.0)
        largest = torch.maximum(largest, torch.maximum(lse.abs(), span).nan_to_num(1))
    return 4 * 2.0**-23 * largest


def assert_loss_close(got: torch.Tensor, want: torch.Tensor, tolerance: torch.Tensor, what=""):
    """Infinities and NaN must match exactly; finite losses must agree within the tolerance."""
    got, want = got.double().cpu(), want.double().cpu()
    assert torch.equal(torch.isnan(got), torch.isnan(want)), f"{what}: NaN in other places; got {got}, expected {want}"
    infinite = torch.isinf(want)
    assert torch.equal(got[infinite], want[infinite]), f"{what}: got {got}, expected {want}"
    finite = torch.isfinite(want)
    error = (got - want).abs()[finite]
    allowed = tolerance.double().cpu()[finite]
    assert (error <= allowed).all(), (
        f"{what}: error {error.max():.3e}, allowed {allowed.max():.3e}; got {got}, expected {want}"
    )


# A gradient is rounded to its dtype once. Earlier rounding errors are relative to the row's largest slope.
GRADIENT_TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def undecided_signs(student, teacher, temperature, ulps: torch.Tensor) -> torch.Tensor:
    """`kdkernels.selftest.undecided_signs`, with a closeness `ulps` for each row."""
    return selftest.undecided_signs(student, teacher, temperature, ulps[..., None])


def slopes_of_kl(student, teacher, temperature, divergence) -> torch.Tensor:
    """Sum over classes of |d KL(p | q) / d log p|, and of |d KL(q | p) / d log q| for the reverse KL; 0 otherwise.

    The sum is sum p |log(p / q) - KL|, which has no bound. The slopes with respect to the other side, |p - q|, sum to
    2 at most: their error of 1.5 ulp is within the 4 ulp of `rounding`.
    """
    lq = (student.double() / temperature).log_softmax(-1)
    lp = (teacher.double() / temperature).log_softmax(-1)
    found = torch.zeros(lq.shape[:-1], dtype=torch.float64, device=lq.device)
    for name, log_probs in (("kl", lp), ("reverse_kl", lq)):
        if divergence.name in (name, "mixed_kl"):
            probs = log_probs.exp()
            ratio = torch.where(probs == 0, 0, lp - lq)
            mean = (probs * ratio).sum(-1, keepdim=True)
            found = torch.maximum(found, (probs * (ratio - mean)).abs().sum(-1))
    return found


def slopes_if_steep(student, teacher, temperature, divergence) -> torch.Tensor:
    """Sum of |slopes| of a steep divergence by log p and by log q, in fp64, without infinite ones. Others: 0.

    Log-probabilities are 1.5 ulp off at most, and the loss 1.5 ulp times that sum.
    """
    log_probs = [(x.double() / temperature).log_softmax(-1).requires_grad_() for x in (teacher, student)]
    if not divergence.is_steep:
        return torch.zeros(student.shape[:-1], dtype=torch.float64, device=student.device)
    phi = TABLE[divergence.name](*log_probs, *(x.exp() for x in log_probs), divergence.parameter)
    by_teacher, by_student = torch.autograd.grad(phi.sum(), log_probs)
    return (by_teacher.abs() + by_student.abs()).nan_to_num(0, 0).sum(-1)


def rounding_if_steep(
    student, teacher, temperature, divergence, dtype=torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """The errors of a steep divergence's loss, and of its gradient by logits times T, from the rounding of
    log-probabilities: in fp64, a number for each row and one for each logit. 0 for other divergences, and in rows whose
    slopes have size 1.

    In fp32 a log-probability is off by r = 2^-23 (1 + 1.5 |log p|): it is a difference of terms no larger than itself.
    If a head rounds the logits to 16 bits, it is off by half a unit of its logit, and by the mean of that over p. With
    psi = d phi / d log q and chi = d phi / d log p, the loss is off by sum |psi| r_q + |chi| r_p. psi_k is off by
    e_k = |d psi_k / d log p| r_p + |d psi_k / d log q| r_q, and the element psi_k - q_k sum psi by
    e_k + q_k (sum e + r_q |sum psi|). At p = q the two derivatives sum to 2 over the classes (chi_square: 4), for which
    the tolerances have room; the factor 1 - 4 / sum leaves the excess.
    """
    if not divergence.is_steep:
        return torch.zeros(student.shape[:-1], dtype=torch.float64), torch.zeros_like(student, dtype=torch.float64)
    logits = [x.double() / temperature for x in (teacher, student)]
    log_p, log_q = (x.log_softmax(-1).requires_grad_() for x in logits)
    phi = TABLE[divergence.name](log_p, log_q, log_p.exp(), log_q.exp(), divergence.parameter)
    psi, chi = torch.autograd.grad(phi.sum(), (log_q, log_p), create_graph=True)
    slopes = [x.abs().nan_to_num(0, 0) for x in torch.autograd.grad(psi.sum(), (log_p, log_q))]
    if dtype == torch.float32:
        r_p, r_q = (2.0**-23 * (1 + 1.5 * x.detach().abs().nan_to_num(0, 0, 0)) for x in (log_p, log_q))
    else:
        r_p, r_q = (torch.finfo(dtype).eps / 2 * x.abs().nan_to_num(0, 0, 0) for x in logits)
        r_p = r_p + (r_p * log_p.detach().exp()).sum(-1, keepdim=True)
        r_q = r_q + (r_q * log_q.detach().exp()).sum(-1, keepdim=True)
    e, psi, chi = slopes[0] * r_p + slopes[1] * r_q, *(x.detach().nan_to_num(0, 0, 0) for x in (psi, chi))
    of_loss = (psi.abs() * r_q + chi.abs() * r_p).sum(-1)
    of_logit = e + log_q.detach().exp() * (e.sum(-1, keepdim=True) + r_q * psi.sum(-1, keepdim=True).abs())
    excess = (1 - 4 / sum(slopes).sum(-1, keepdim=True)).clamp_min(0)
    return (of_loss * excess[..., 0]).nan_to_num(0), (of_logit * excess).nan_to_num(0)


def assert_gradient_close(got: torch.Tensor, want: torch.Tensor, of_row: torch.Tensor, what="", of_class=0):
    """`of_row` is the absolute error allowed in each row: the row's rounding error times the size of its slopes.
    `of_class` is an additional absolute error allowed in each class.
    """
    relative = GRADIENT_TOLERANCE[got.dtype]
    subnormal = 2.0**-24 if got.dtype == torch.float16 else 1e-37
    got, want = got.double().cpu(), want.double().cpu()
    assert torch.equal(torch.isnan(got), torch.isnan(want)), f"{what}: NaN in other places than expected"
    got, want = got.nan_to_num(0), want.nan_to_num(0)
    row_max = want.abs().amax(-1, keepdim=True)
    allowed = relative * want.abs() + 1e-6 * row_max + of_row.double().cpu()[..., None] + subnormal
    allowed += torch.as_tensor(of_class).cpu()
    error = (got - want).abs()
    assert (error <= allowed).all(), f"{what}: error {(error / allowed).max():.2f} times the allowed error"


def xlogy(p, log_ratio):
    return torch.where(p == 0, 0, p * torch.where(p == 0, 0, log_ratio))


def formula_value(divergence: Divergence, p, q):
    """The formula of the catalogue, of whole distributions [..., classes] and not of the table's terms."""
    a, log = divergence.parameter, torch.log

    def kl(p, q):
        return xlogy(p, log(torch.where(p == 0, 1, p)) - log(torch.where(p == 0, 1, q))).sum(-1)

    match divergence.name:
        case "kl":
            return kl(p, q)
        case "reverse_kl":
            return kl(q, p)
        case "mixed_kl":
            return a * kl(p, q) + (1 - a) * kl(q, p)
        case "js":
            m = a * p + (1 - a) * q
            return a * kl(p, m) + (1 - a) * kl(q, m)
        case "skew_kl":
            return kl(p, a * p + (1 - a) * q)
        case "skew_reverse_kl":
            return kl(q, (1 - a) * p + a * q)
        case "tv":
            return 0.5 * (p - q).abs().sum(-1)
        case "hellinger":
            p_root, q_root = (torch.where(x == 0, 0, torch.where(x == 0, 1, x).sqrt()) for x in (p, q))
            return 0.5 * ((p_root - q_root) ** 2).sum(-1)
        case "alpha":
            nowhere = (p == 0) & (q == 0)
            power = torch.where(nowhere, 1, p) ** a * torch.where(nowhere, 1, q) ** (1 - a)
            return (torch.where(nowhere, 0, power).sum(-1) - 1) / (a * (a - 1))
        case "chi_square":
            nowhere = (p == 0) & (q == 0)
            return ((p - q) ** 2 / torch.where(nowhere, 1, q)).sum(-1)
    raise AssertionError(divergence)


def opcheck(operator, *arguments):
    """Runs torch's operator checks. An operator that takes a problem is checked in its flat form."""
    if isinstance(operator, Operator):
        problem, *arguments = arguments
        operator, arguments = operator.flat, [*operator.fields.flatten(problem), *arguments]
    torch.library.opcheck(operator, tuple(arguments))
