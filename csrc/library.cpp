// The namespace that the ops live in; each op adds its schema in ops/<op>/<op>.cpp.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(starflow_ext, m) { (void)m; }
