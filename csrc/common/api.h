// What the op library shows to the pybind11 module; every other symbol of it is hidden.
#pragma once
#define STARFLOW_API __attribute__((visibility("default")))
