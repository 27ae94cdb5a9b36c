// What memory holds, as a number: tells whether weights are still those that a packed copy was made from.
//
//   lane[i] = rotate((lane[i] ^ word[i]) * odd, 31)     for the 8 words of 8 bytes of each line, in 8 lanes
//   result  = the same step over the lanes, then over the parts of 1 MB and the sizes of the blocks
//
// Each step is one to one in the word, so a change of one word always changes the result; several changes cancel out by
// chance alone, 1 in 2^64. It is no protection against somebody who wants them to. Memory: each line once.
#pragma once
#include <cstdint>

#include "common/api.h"

namespace starflow::cpu {

struct MemoryBlock {
    const void* data;
    int64_t bytes;
};

// The fingerprint of the blocks in their order; the bits do not depend on the number of threads. With `most_lines` > 0
// only as many lines of 64 bytes of each block are read, evenly spread, the first and the last among them.
STARFLOW_API uint64_t fingerprint(const MemoryBlock* blocks, int64_t count, int64_t most_lines);

}  // namespace starflow::cpu
