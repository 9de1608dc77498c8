"""The names of what a row sweep finds."""

# Statistics of a row, in the order of the [len, rows] tensor that every backend fills.
ROW_STATISTICS = (
    "divergence",
    "cross_entropy",
    "tv",
    "student_entropy",
    "teacher_entropy",
    "student_max_log_prob",
    "teacher_max_log_prob",
    "student_label_log_prob",
    "teacher_label_log_prob",
    "student_lse",
    "teacher_lse",
)
# Those that are class indices, in the order of the int64 [2, rows] tensor.
ROW_TOP1 = ("student_top1", "teacher_top1")
ROW_FLOATS = ("student_max", "student_log_sum", "teacher_max", "teacher_log_sum", "unit_log_sum")
ROW_SUMS = ("phi", "psi")
