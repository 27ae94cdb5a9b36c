// Launches that are repeated until a kernel among them says that it was the last turn: a graph with a WHILE node, a
// graph of one turn, or plain launches (repeat.h). The same body serves all three.
#pragma once
#include <cuda_runtime.h>

#include "cuda/repeat.h"

namespace starflow::cuda {

// What the last kernel of a turn is given to say so.
struct Again {
    unsigned long long handle;  // of the WHILE node
    bool in_node;
};

// Called by one thread of a turn's last kernel.
__device__ inline void set_again(const Again& again, bool value) {
#if CUDART_VERSION >= 12040
    if (again.in_node) cudaGraphSetConditional(again.handle, value ? 1U : 0U);
#endif
}

namespace {

// What a repetition holds while it is enqueued.
struct Graph {
    cudaStream_t stream = nullptr;  // captures, and runs nothing: a caller's may be the default one, which cannot
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;

    Graph() = default;
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;
    ~Graph() {
        if (executable != nullptr) cudaGraphExecDestroy(executable);
        if (graph != nullptr) cudaGraphDestroy(graph);
        if (stream != nullptr) cudaStreamDestroy(stream);
    }
};

// Makes calls one after the other, up to the first that fails, whose error the next call of the runtime does not find.
class Steps {
  public:
    template <class Call>
    bool operator()(const Call& call) {
        if (code_ != 0) return false;
        code_ = static_cast<int>(call());
        if (code_ != 0) cudaGetLastError();
        return code_ == 0;
    }
    int code() const { return code_; }

  private:
    int code_ = 0;
};

// Whether there is another turn, as the device says once the stream has come here.
int ask(const int64_t* more, int64_t& answer, cudaStream_t stream) {
    Steps step;
    step([&] { return cudaMemcpyAsync(&answer, more, sizeof(answer), cudaMemcpyDeviceToHost, stream); });
    step([&] { return cudaStreamSynchronize(stream); });
    return step.code();
}

#if CUDART_VERSION >= 12040
template <class Body>
int repeat_in_node(cudaStream_t stream, const Body& body) {
    Graph own;
    Steps step;
    Again again{0, true};
    cudaGraphNodeParams node{};
    step([&] { return cudaStreamCreateWithFlags(&own.stream, cudaStreamNonBlocking); });
    step([&] { return cudaGraphCreate(&own.graph, 0); });
    // Each launch of the graph begins with a turn.
    step([&] { return cudaGraphConditionalHandleCreate(&again.handle, own.graph, 1, cudaGraphCondAssignDefault); });
    step([&] {
        node.type = cudaGraphNodeTypeConditional;
        node.conditional.handle = again.handle;
        node.conditional.type = cudaGraphCondTypeWhile;
        node.conditional.size = 1;
        cudaGraphNode_t added = nullptr;
#if CUDART_VERSION >= 13000
        return cudaGraphAddNode(&added, own.graph, nullptr, nullptr, 0, &node);
#else
        return cudaGraphAddNode(&added, own.graph, nullptr, 0, &node);
#endif
    });
    const bool begun = step([&] {
        return cudaStreamBeginCaptureToGraph(own.stream, node.conditional.phGraph_out[0], nullptr, nullptr, 0,
                                             cudaStreamCaptureModeRelaxed);
    });
    step([&] { return body(own.stream, again); });
    if (begun) {
        cudaGraph_t captured = nullptr;  // the node's, which goes with the graph
        const cudaError_t ended = cudaStreamEndCapture(own.stream, &captured);
        step([&] { return ended; });
    }
    step([&] { return cudaGraphInstantiate(&own.executable, own.graph, 0); });
    step([&] { return cudaGraphLaunch(own.executable, stream); });
    // What the graph holds must outlive it.
    step([&] { return cudaStreamSynchronize(stream); });
    return step.code();
}
#endif

template <class Body>
int repeat_steps(const int64_t* more, cudaStream_t stream, const Body& body) {
    Graph own;
    Steps step;
    step([&] { return cudaStreamCreateWithFlags(&own.stream, cudaStreamNonBlocking); });
    const bool begun = step([&] { return cudaStreamBeginCapture(own.stream, cudaStreamCaptureModeRelaxed); });
    step([&] { return body(own.stream, Again{0, false}); });
    if (begun) {
        const cudaError_t ended = cudaStreamEndCapture(own.stream, &own.graph);
        step([&] { return ended; });
    }
    step([&] { return cudaGraphInstantiate(&own.executable, own.graph, 0); });
    int64_t answer = 1;
    while (answer != 0 && step.code() == 0) {
        step([&] { return cudaGraphLaunch(own.executable, stream); });
        step([&] { return ask(more, answer, stream); });
    }
    return step.code();
}

template <class Body>
int repeat_launches(const int64_t* more, cudaStream_t stream, const Body& body) {
    Steps step;
    int64_t answer = 1;
    while (answer != 0 && step.code() == 0) {
        step([&] { return body(stream, Again{0, false}); });
        step([&] { return ask(more, answer, stream); });
    }
    return step.code();
}

}  // namespace

// Runs turns of body(stream, again), at least one, until a turn has said no by set_again and in *more, which lies on
// the device. Every turn has the launches and the arguments of the first. Returns when the last has run.
template <class Body>
int repeat(Repeat how, const int64_t* more, void* stream, const Body& body) {
    auto* caller = static_cast<cudaStream_t>(stream);
#if CUDART_VERSION >= 12040
    if (how == Repeat::graph) return repeat_in_node(caller, body);
#endif
    return how == Repeat::loop ? repeat_launches(more, caller, body) : repeat_steps(more, caller, body);
}

}  // namespace starflow::cuda
