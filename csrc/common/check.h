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

// A dtype that kernels compute with.
void check_floating(const char* op, const char* name, const Tensor& tensor);

// A second tensor that must look like the first.
void check_like(const char* op, const char* name, const Tensor& tensor, const char* like_name, const Tensor& like);

// A tensor that is written: two places of it that are one place in memory would be written twice, in an order that
// nobody promises.
void check_own_memory(const char* op, const char* name, const Tensor& tensor);

// The same device as the first tensor's.
void check_device(const char* op, const char* name, const Tensor& tensor, const char* like_name, const Tensor& like);

}  // namespace starflow
