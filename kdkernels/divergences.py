"""The catalogue of divergences: names, parameters, formulas, sources. No tensors here.

Throughout, p is the teacher's and q the student's distribution over the classes of a row. Directions follow GKD
(Agarwal et al. 2024, arXiv:2306.13649, Eq. 1). A new divergence needs an entry here, its value and slope of one class
in csrc/divergences.h and backends/triton/table.py, and its value in backends/reference/table.py. So do its close lines.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

from .checks import check_size

_INFINITY = float("inf")
_MARGIN = 0.001


@dataclass(frozen=True)
class Entry:
    """One divergence of the catalogue.

    `low` and `high` bound its parameter; `closed` admits the bounds themselves. A parameter within 0.001 of an
    `excluded` value is refused. `examples` are parameters that the tests try; without them the tests try the default.
    The other fields are functions of the parameter:

    - `infinite_without_teacher`: the divergence is +inf if the student has mass on a class without teacher mass. The
      gradient of such a row is NaN.
    - `infinite_without_student`: the divergence is +inf if the teacher has mass on a class without student mass. The
      gradient of such a row is NaN if the divergence is steep; otherwise it is the finite gradient of the formula.
    - `steep`: the terms are exponentials of the log-ratio. They overflow in fp32 before they do in fp64, and the
      rounding of a log-probability becomes an error relative to the loss.
    - `magnification`: if log-probabilities are right to 4 units in the last place of the log-sum-exp, the loss is right
      to `magnification · (1 + loss)` times that.
    - `linear_in_teacher`: the gradient with respect to q is linear in p, so a teacher whose probabilities are right on
      average gives a gradient that is right on average.
    - `slack`: c in the value of one class, which is the formula's term plus c (q − p). Σ c (q − p) is 0 unless a sparse
      teacher's mass differs from 1.

    `close_below` is a number: a row in fp32 whose divergence is found to be smaller is found again by the close lines,
    because the rounding of the lines for all rows, about 1e-7, is too much of it. 0: the divergence has no close lines.
    """

    formula: str
    source: str
    parameter: str | None = None
    default: float | None = None
    low: float = -_INFINITY
    high: float = _INFINITY
    closed: bool = False
    excluded: tuple[float, ...] = ()
    hint: str = ""
    examples: tuple[float, ...] = ()
    infinite_without_teacher: Callable[[float | None], bool] = lambda parameter: False
    infinite_without_student: Callable[[float | None], bool] = lambda parameter: False
    steep: Callable[[float | None], bool] = lambda parameter: False
    magnification: Callable[[float | None], float] = lambda parameter: 1.0
    linear_in_teacher: Callable[[float | None], bool] = lambda parameter: False
    slack: Callable = lambda parameter: 0.0
    close_below: float = 0.0


CATALOGUE: dict[str, Entry] = {
    "kl": Entry(
        "KL(p‖q) = Σ p log(p/q)",
        "Hinton et al. 2015, arXiv:1503.02531",
        infinite_without_student=lambda _: True,
        linear_in_teacher=lambda _: True,
        slack=lambda _: 1.0,
        close_below=1 / 16,
    ),
    "reverse_kl": Entry(
        "KL(q‖p) = Σ q log(q/p)",
        "Gu et al. 2024 (MiniLLM), arXiv:2306.08543, Eq. 1",
        infinite_without_teacher=lambda _: True,
        slack=lambda _: -1.0,
        close_below=1 / 16,
    ),
    "mixed_kl": Entry(
        "w·KL(p‖q) + (1−w)·KL(q‖p)",
        "Amara et al. 2022 (BD-KD), arXiv:2212.12965",
        parameter="weight",
        default=0.5,
        low=0.0,
        high=1.0,
        closed=True,
        examples=(0.3,),
        infinite_without_teacher=lambda weight: weight < 1,
        infinite_without_student=lambda weight: weight > 0,
        linear_in_teacher=lambda weight: weight == 1,
        slack=lambda weight: 2 * weight - 1,
        close_below=1 / 16,
    ),
    "js": Entry(
        "β·KL(p‖m) + (1−β)·KL(q‖m), m = βp + (1−β)q",
        "Agarwal et al. 2024 (GKD), arXiv:2306.13649, Eq. 1",
        parameter="beta",
        default=0.5,
        low=0.0,
        high=1.0,
        hint='at 0 and 1 js is 0; use "kl" or "reverse_kl", or Divergence.gkd(beta), which has them as its ends',
        examples=(0.5, 0.1),
        close_below=1 / 32,
    ),
    "skew_kl": Entry(
        "KL(p‖αp + (1−α)q)",
        "Ko et al. 2024 (DistiLLM), arXiv:2402.03898, Sec. 3.1",
        parameter="alpha",
        default=0.1,
        low=0.0,
        high=1.0,
        hint='at 0 skew_kl is "kl"',
        slack=lambda alpha: 1 - alpha,
        close_below=1 / 16,
    ),
    "skew_reverse_kl": Entry(
        "KL(q‖(1−α)p + αq)",
        "Ko et al. 2024 (DistiLLM), arXiv:2402.03898, Sec. 3.1",
        parameter="alpha",
        default=0.1,
        low=0.0,
        high=1.0,
        hint='at 0 skew_reverse_kl is "reverse_kl"',
        slack=lambda alpha: alpha - 1,
        close_below=1 / 16,
    ),
    "tv": Entry("½ Σ |p − q|", "Wen et al. 2023 (f-DISTILL), arXiv:2307.15190", close_below=1 / 8),
    "hellinger": Entry("½ Σ (√p − √q)²", "Hellinger 1909; squared Hellinger distance", close_below=1 / 64),
    "alpha": Entry(
        "(Σ pᵅ q¹⁻ᵅ − 1) / (α(α−1))",
        "Amari 1985; Wang et al. 2021 (AlphaNet), arXiv:2102.07954",
        parameter="alpha",
        default=0.5,
        excluded=(0.0, 1.0),
        hint='its limit at 1 is "kl", at 0 "reverse_kl", and near them fp32 loses its digits',
        examples=(0.5, 1.5, -0.5),
        infinite_without_teacher=lambda alpha: alpha < 0,
        infinite_without_student=lambda alpha: alpha > 1,
        steep=lambda alpha: not 0 < alpha < 1,
        # Terms are divided by α (α − 1); and of a log-probability's 1.5 ulp, a power gets |α| + |1 − α| times that.
        magnification=lambda alpha: max(1 / abs(alpha * (alpha - 1)), 1.5 / 4 * (abs(alpha) + abs(1 - alpha))),
        slack=lambda alpha: 1 / (alpha - 1),
        close_below=1 / 8,
    ),
    "chi_square": Entry(
        "Σ (p − q)² / q",
        "Pearson 1900; Nielsen and Nock 2014, arXiv:1309.3029",
        infinite_without_student=lambda _: True,
        steep=lambda _: True,
        # Σ |∂/∂log p| + |∂/∂log q| ≤ 3 χ² + 4 √χ² ≤ 4 (1 + χ²), and a log-probability is off by 1.5 ulp.
        magnification=lambda _: 1.5,
        close_below=1 / 8,
    ),
}

# The names that papers and other packages (DistiLLM, TRL, Liger, ROLL, verl, speculators, SciPy) give to the entries.
# They are no aliases: the error for such a name says the entry's name.
_NAMES_ELSEWHERE = {
    "kl": "forward_kl forward_kld fkl fkld kl_div kldiv kld kl_divergence kullback_leibler",
    "reverse_kl": "backward_kl reverse_kld reverse_kl_div reverse_kl_divergence rkl rkld",
    "mixed_kl": "symmetric_kl sym_kl",
    "js": "jsd gjs gjsd generalized_js generalized_jsd jensen_shannon jensenshannon js_distance js_div js_divergence",
    "skew_kl": "skl sfkl skew_forward_kl skewed_kl skewed_forward_kl",
    "skew_reverse_kl": "srkl skewed_reverse_kl",
    "tv": "tvd tv_distance total_variation total_variation_distance",
    "hellinger": "hellinger_distance hellinger_squared squared_hellinger",
    "alpha": "alpha_divergence alpha_div amari amari_alpha",
    "chi_square": "chi2 chi_2 chisq chisquare chi_squared chi_square_divergence pearson pearson_chi2",
}
_ENTRY_OF = {theirs: ours for ours, names in _NAMES_ELSEWHERE.items() for theirs in names.split()}
# Names of what is no entry, and its relation to the entries.
_RELATED = {
    "gkd": "Divergence.gkd(beta): 'kl' at 0, 'reverse_kl' at 1, 'js' between",
    "akl": "'mixed_kl' with a weight for each row; here all rows have one weight",
    "adaptive_kl": "'mixed_kl' with a weight for each row; here all rows have one weight",
    "jeffreys": "2 times 'mixed_kl' at weight 0.5",
    "ce": "'kl' plus the teacher's entropy, a constant; hard_weight=1 gives the cross-entropy of the labels",
    "cross_entropy": "'kl' plus the teacher's entropy, a constant; hard_weight=1 gives the cross-entropy of the labels",
    "soft_cross_entropy": "'kl' plus the teacher's entropy, a constant",
}


class Divergence:
    """A divergence with its parameter: `Divergence("skew_kl", alpha=0.1)`, `Divergence("tv")`.

    The parameter is a run-time number: a change between calls recompiles nothing. Raises ValueError for an unknown name
    (with the entry's own name for a name of another package, else with the nearest known one), an unknown parameter,
    and a parameter outside its range; TypeError for a parameter that is no number.
    """

    __slots__ = ("name", "parameter")

    def __init__(self, name: str, **parameters: float):
        entry = CATALOGUE.get(name) if isinstance(name, str) else None
        if entry is None:
            raise ValueError(f"unknown divergence {name!r}{_advice(name)}; known: {', '.join(CATALOGUE)}")
        for given in parameters:
            if given != entry.parameter:
                takes = f"the parameter {entry.parameter!r}" if entry.parameter else "no parameter"
                raise ValueError(f"divergence {name!r} takes {takes}; got {given!r}")
        self.name = name
        self.parameter = parameters.get(entry.parameter, entry.default) if entry.parameter else None
        if entry.parameter:
            _check_parameter(name, entry, self.parameter)

    @staticmethod
    def gkd(beta: float) -> "Divergence":
        """GKD's family, for beta in [0, 1]: "kl" at 0, "reverse_kl" at 1, and "js" with that beta between them.

        This is the convention of GKD and of TRL's, Liger's and ms-swift's `beta`: the mixture of js is m = beta p +
        (1 - beta) q with the teacher's p. The family is not continuous at its ends: js tends to 0 there, for TRL and
        the others too. Raises TypeError unless beta is a number, ValueError outside [0, 1].
        """
        _check_number("gkd", "beta", beta)
        if not 0 <= beta <= 1:
            raise ValueError(f"gkd: beta must be in [0, 1]; got {beta}")
        if beta == 0:
            return Divergence("kl")
        if beta == 1:
            return Divergence("reverse_kl")
        return Divergence("js", beta=beta)

    @staticmethod
    def examples(name: str) -> list["Divergence"]:
        """The divergence of that name with each of its entry's `examples`, or with its default."""
        entry = CATALOGUE[name]
        if not entry.examples:
            return [Divergence(name)]
        return [Divergence(name, **{entry.parameter: value}) for value in entry.examples]

    @property
    def is_infinite_without_teacher(self) -> bool:
        """Whether the divergence is +inf if the student has mass on a class without teacher mass."""
        return CATALOGUE[self.name].infinite_without_teacher(self.parameter)

    @property
    def is_infinite_without_student(self) -> bool:
        """Whether the divergence is +inf if the teacher has mass on a class without student mass."""
        return CATALOGUE[self.name].infinite_without_student(self.parameter)

    @property
    def is_steep(self) -> bool:
        """Whether the terms are exponentials of the log-ratio, which overflow and magnify rounding."""
        return CATALOGUE[self.name].steep(self.parameter)

    @property
    def is_linear_in_teacher(self) -> bool:
        """Whether the gradient is linear in p: then draws of the teacher's classes do not bias it."""
        return CATALOGUE[self.name].linear_in_teacher(self.parameter)

    @property
    def magnification(self) -> float:
        """The factor, times 1 + loss, by which the divergence magnifies the rounding of log-probabilities."""
        return CATALOGUE[self.name].magnification(self.parameter)

    def __repr__(self):
        parameter = CATALOGUE[self.name].parameter
        return f"Divergence({self.name!r}" + (f", {parameter}={self.parameter!r})" if parameter else ")")

    def __eq__(self, other):
        if not isinstance(other, Divergence):
            return NotImplemented
        return (self.name, self.parameter) == (other.name, other.parameter)

    def __hash__(self):
        return hash((self.name, self.parameter))


def _advice(name) -> str:
    """What an unknown name means, for an error: by the names of other packages, else by the spelling."""
    plain = re.sub(r"[\W_]+", "_", str(name).lower()).strip("_")
    if plain in _RELATED:
        return f": {name!r} is {_RELATED[plain]}"
    if plain in _ENTRY_OF or plain in CATALOGUE:
        ours = _ENTRY_OF.get(plain, plain)
        return f": {name!r} is called {ours!r} here, {CATALOGUE[ours].formula}"
    near = difflib.get_close_matches(plain, [*CATALOGUE, *_ENTRY_OF], n=1, cutoff=0.6)
    if not near:
        return ""
    called = f", which is called {_ENTRY_OF[near[0]]!r} here" if near[0] in _ENTRY_OF else ""
    return f", did you mean {near[0]!r}{called}?"


def _check_number(name: str, parameter: str, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: {parameter} must be a float; got {type(value).__name__}")
    check_size(f"{name}: {parameter}", value)


def _check_parameter(name: str, entry: Entry, value: float):
    _check_number(name, entry.parameter, value)
    inside = entry.low <= value <= entry.high if entry.closed else entry.low < value < entry.high
    if inside and all(abs(value - x) >= _MARGIN for x in entry.excluded):
        return
    if entry.excluded:
        expected = f"finite and at least {_MARGIN} from " + " and ".join(f"{x:g}" for x in entry.excluded)
    else:
        expected = f"in {'[' if entry.closed else '('}{entry.low:g}, {entry.high:g}{']' if entry.closed else ')'}"
    hint = f" ({entry.hint})" if entry.hint else ""
    raise ValueError(f"{name}: {entry.parameter} must be {expected}; got {value}{hint}")
