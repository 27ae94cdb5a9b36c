// How launches are repeated on the device until it says stop; the ways are in repeat.cuh. No CUDA, no torch.
#pragma once
#include <cstdint>
#include <string>

#include "common/api.h"

namespace starflow::cuda {

// graph   a graph whose WHILE node holds one turn: the host launches it once and asks nothing (CUDA 12.4 and later)
// step    a graph of one turn, launched again and again; the host asks after each
// loop    the launches of a turn, again and again; the host asks after each
enum class Repeat : int32_t { graph, step, loop };

// The override, else graph where the toolkit of the build and the driver have it, else step.
Repeat chosen_repeat();
STARFLOW_API std::string repeat_name();

// Set the override; an empty name takes it away. Throws std::runtime_error for a name that is no way.
STARFLOW_API void set_repeat(const std::string& name);

}  // namespace starflow::cuda
