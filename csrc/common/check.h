// The only path of a user error: one sentence that names the op, the argument, what was given and what was expected.
// starflow_ext/starflow_ext/_check.py says the same sentences for the references.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/tensor.h"

namespace starflow {

// RuntimeError in Python. The message is built only when the check fails, of an argument too that is a function.
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

// "x has shape", put together only when it is said.
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

// A dtype that kernels compute with.
void check_floating(const char* op, const char* name, const Tensor& tensor);

// A tensor of this dtype and shape, on the device of another one.
void check_tensor(const char* op, const char* name, const Tensor& tensor, ScalarType type,
                  const std::vector<int64_t>& shape, const char* like_name, const Tensor& like);

// A second tensor that must look like the first.
void check_like(const char* op, const char* name, const Tensor& tensor, const char* like_name, const Tensor& like);

// A tensor that is written: two places of it that are one place in memory would be written twice, in an order that
// nobody promises.
void check_own_memory(const char* op, const char* name, const Tensor& tensor);

// The same device as the first tensor's.
void check_device(const char* op, const char* name, const Tensor& tensor, const char* like_name, const Tensor& like);

}  // namespace starflow
