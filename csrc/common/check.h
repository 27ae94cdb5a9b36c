// The only path of a user error: one sentence that names the op, the argument, what was given and what was expected.
// starflow_ext/starflow_ext/_check.py says the same sentences for the references.
#pragma once
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/tensor.h"

namespace starflow {

// Raises RuntimeError in Python. The message is built, and an argument that is a function called, only on failure.
template <class Argument, class Got, class Expected>
void require(bool condition, const char* op, const Argument& argument, const Got& got, const Expected& expected) {
    if (condition) return;
    std::ostringstream sentence;
    sentence << op << ": ";
    if constexpr (std::is_invocable_v<Argument>) {
        sentence << argument();
    } else {
        sentence << argument;
    }
    sentence << ' ' << got() << ", expected " << expected();
    throw std::runtime_error(sentence.str());
}

// Text such as "x has shape", which is put together only for a message.
inline auto named(const char* name, const char* rest) {
    return [=] { return std::string(name) + rest; };
}

// A value of an option that a schema takes as its number in the enum: numbers and not names, since each string that
// crosses the stable ABI leaves 48 bytes behind. Python turns names into numbers. Values below `first` are not taken.
template <class Enum, size_t count>
Enum option_of(const char* op, const char* argument, int64_t number, const char* const (&names)[count],
               Enum first = Enum{}) {
    const auto least = static_cast<int64_t>(first);
    require(
        number >= least && number < static_cast<int64_t>(count), op, named(argument, " is"), [&] { return number; },
        [&] {
            std::ostringstream known;
            for (int64_t i = least; i < static_cast<int64_t>(count); ++i) {
                if (i > least) known << (i + 1 < static_cast<int64_t>(count) ? ", " : " or ");
                known << i << " (\"" << names[i] << "\")";
            }
            return known.str();
        });
    return static_cast<Enum>(number);
}

// Requires a dtype that kernels compute with.
void check_floating(const char* op, const char* name, const Tensor& tensor);

// Requires this dtype and shape, and the device of another tensor.
void check_tensor(const char* op, const char* name, const Tensor& tensor, ScalarType type,
                  const std::vector<int64_t>& shape, const char* like_name, const Tensor& like);

// Requires a second tensor to look like the first.
void check_like(const char* op, const char* name, const Tensor& tensor, const char* like_name, const Tensor& like);

// Requires that no two elements of a tensor that is written share memory: that place would be written twice, in an
// order that nobody promises.
void check_own_memory(const char* op, const char* name, const Tensor& tensor);

// Requires that a tensor that is written has no memory in common with another one that the call reads or writes: what
// is read there would be old or new as the order of the rows has it.
void check_apart(const char* op, const char* name, const Tensor& tensor, const char* other_name, const Tensor& other);

// Whether two tensors of one shape have the same elements of memory in the same places.
bool is_same_view(const Tensor& a, const Tensor& b);

// The sum of two numbers as text, also where 63 bits do not hold it; of numbers that are not both above 0 their sum.
std::string sum_text(int64_t a, int64_t b);

// Requires finite numbers above 0, such as temperatures. In memory of the CPU.
template <class Number>
void require_positive(const char* op, const char* argument, const Number* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const double value = static_cast<double>(values[i]);
        require(
            value > 0.0 && value <= std::numeric_limits<double>::max(), op, argument, [&] { return value; },
            [] { return "finite numbers > 0"; });
    }
}

// Requires the device of the first tensor.
void check_device(const char* op, const char* name, const Tensor& tensor, const char* like_name, const Tensor& like);

}  // namespace starflow
