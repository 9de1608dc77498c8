// Calls of the element-wise kernels that a head needs around its matrix products and row sweeps. All kernels work in
// place.
#pragma once
#include "types.h"

namespace kdk {

// logits[i] = cap * tanh(logits[i] / cap)
struct SoftcapCall {
  int64_t count;
  Stored logits;
  double cap;
  KDK_FIELDS(count, logits, cap)
  Execution run;
};

// gradient[i] *= 1 - (logits[i] / cap)^2 for capped logits of the gradient's dtype. A gradient of 0 stays 0.
struct SoftcapGradientCall {
  int64_t count;
  Stored gradient;
  Stored logits;
  double cap;
  KDK_FIELDS(count, gradient, logits, cap)
  Execution run;
};

// total[i] += part[i], with the total in fp32 and the part in 16 bits.
struct AccumulateCall {
  int64_t count;
  Numbers total;
  Stored part;
  KDK_FIELDS(count, total, part)
  Execution run;
};

}  // namespace kdk
