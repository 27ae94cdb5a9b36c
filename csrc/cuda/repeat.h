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

// Whether the launches of a sweep begin before the one in front of each has ended (programmatic dependent launch), on
// devices that have it, which is from compute capability 9.0 on. Graphs take such launches from CUDA 12.3 on.
bool early_launches();
STARFLOW_API void set_early_launches(bool on);

}  // namespace starflow::cuda
