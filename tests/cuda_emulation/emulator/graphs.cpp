#include "graphs.h"

#include <cstdlib>
#include <cstring>
#include <list>
#include <map>
#include <memory>
#include <vector>

struct CUgraphNode_st {
    emulation::Launch how{};
    void (*run)(const void*) = nullptr;  // null: a conditional node
    std::shared_ptr<void> closure;
    size_t closure_bytes = 0;
    unsigned long long handle = 0;
    std::shared_ptr<CUgraph_st> body;
};

struct CUgraph_st {
    std::list<CUgraphNode_st> nodes;
    std::vector<unsigned long long> handles;
};

struct CUgraphExec_st {
    std::list<CUgraphNode_st> nodes;
};

struct CUstream_st {
    CUgraph_st* captures = nullptr;
    bool own_graph = false;  // made by the capture
    bool invalid = false;
};

namespace emulation {
namespace {

constexpr int most_turns = 10000;

struct Condition {
    unsigned initial;
    unsigned value;
    bool running;  // inside of its node
};

std::map<unsigned long long, Condition> conditions;
int live_objects = 0;
int calls_to_failure = 0;

// Whether this call of the runtime is the one that shall fail.
bool fails() { return calls_to_failure > 0 && --calls_to_failure == 0; }

// What is neither allowed while a stream captures nor kept by it.
bool refused(cudaStream_t stream) {
    if (stream == nullptr || stream->captures == nullptr) return false;
    stream->invalid = true;
    return true;
}

cudaError_t run(const std::list<CUgraphNode_st>& nodes) {
    for (const CUgraphNode_st& node : nodes) {
        if (node.run != nullptr) {
            const int code = launch(node.how, node.run, node.closure.get(), node.closure_bytes);
            if (code != cudaSuccess) return static_cast<cudaError_t>(code);
            continue;
        }
        Condition& condition = conditions.at(node.handle);
        condition.value = condition.initial;
        condition.running = true;
        for (int turn = 0; condition.value != 0; ++turn) {
            if (turn == most_turns) return cudaErrorLaunchTimeout;
            if (const cudaError_t code = run(node.body->nodes); code != cudaSuccess) return code;
        }
        condition.running = false;
    }
    return cudaSuccess;
}

}  // namespace

int launch_on(void* stream, const Launch& how, void (*run)(const void*), const void* closure, size_t closure_bytes) {
    auto* to = static_cast<cudaStream_t>(stream);
    if (to == nullptr || to->captures == nullptr) return launch(how, run, closure, closure_bytes);
    constexpr size_t alignment = 64;
    void* kept = std::aligned_alloc(alignment, (closure_bytes + alignment - 1) / alignment * alignment);
    std::memcpy(kept, closure, closure_bytes);
    CUgraphNode_st node{how, run, {kept, std::free}, closure_bytes, 0, nullptr};
    to->captures->nodes.push_back(std::move(node));
    return cudaSuccess;
}

void set_conditional(unsigned long long handle, unsigned value) {
    const auto found = conditions.find(handle);
    if (found == conditions.end()) fail("cudaGraphSetConditional of handle %llu, which no graph has", handle);
    if (!found->second.running) fail("cudaGraphSetConditional of a node that does not run");
    found->second.value = value;
}

}  // namespace emulation

int emulation_live_objects() { return emulation::live_objects; }
void emulation_fail_call(int n) { emulation::calls_to_failure = n; }

#define EMULATION_CALL extern "C" EMULATION_API cudaError_t CUDARTAPI
#define FAIL_WHERE(condition, code)                  \
    if (emulation::fails()) return cudaErrorUnknown; \
    if (condition) return code

EMULATION_CALL cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    FAIL_WHERE(false, cudaSuccess);
    *stream = new CUstream_st;
    ++emulation::live_objects;
    return cudaSuccess;
}

EMULATION_CALL cudaStreamDestroy(cudaStream_t stream) {
    delete stream;
    --emulation::live_objects;
    return cudaSuccess;
}

EMULATION_CALL cudaStreamSynchronize(cudaStream_t stream) {
    FAIL_WHERE(emulation::refused(stream), cudaErrorStreamCaptureUnsupported);
    return cudaSuccess;
}

EMULATION_CALL cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    FAIL_WHERE(emulation::refused(stream), cudaErrorStreamCaptureUnsupported);
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}

EMULATION_CALL cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    FAIL_WHERE(stream == nullptr, cudaErrorStreamCaptureUnsupported);
    if (stream->captures != nullptr) return cudaErrorIllegalState;
    *stream = {new CUgraph_st, true, false};
    return cudaSuccess;
}

EMULATION_CALL cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph, const cudaGraphNode_t*,
                                             const cudaGraphEdgeData*, size_t dependencies, cudaStreamCaptureMode) {
    FAIL_WHERE(stream == nullptr, cudaErrorStreamCaptureUnsupported);
    if (stream->captures != nullptr) return cudaErrorIllegalState;
    if (graph == nullptr || dependencies != 0) return cudaErrorInvalidValue;
    *stream = {graph, false, false};
    return cudaSuccess;
}

// Ends the capture even where it fails.
EMULATION_CALL cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    const bool failed = emulation::fails();
    if (stream == nullptr || stream->captures == nullptr) return cudaErrorIllegalState;
    const CUstream_st ended = *stream;
    *stream = {};
    *graph = nullptr;
    if (failed || ended.invalid) {
        if (ended.own_graph) delete ended.captures;
        return failed ? cudaErrorUnknown : cudaErrorStreamCaptureInvalidated;
    }
    *graph = ended.captures;
    if (ended.own_graph) ++emulation::live_objects;
    return cudaSuccess;
}

EMULATION_CALL cudaGraphCreate(cudaGraph_t* graph, unsigned) {
    FAIL_WHERE(false, cudaSuccess);
    *graph = new CUgraph_st;
    ++emulation::live_objects;
    return cudaSuccess;
}

EMULATION_CALL cudaGraphDestroy(cudaGraph_t graph) {
    for (const unsigned long long handle : graph->handles) emulation::conditions.erase(handle);
    delete graph;
    --emulation::live_objects;
    return cudaSuccess;
}

EMULATION_CALL cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle* handle, cudaGraph_t graph, unsigned initial,
                                                unsigned flags) {
    static unsigned long long last = 1000;
    FAIL_WHERE(flags != cudaGraphCondAssignDefault, cudaErrorInvalidValue);
    *handle = ++last;
    graph->handles.push_back(last);
    emulation::conditions[last] = {initial, 0, false};
    return cudaSuccess;
}

EMULATION_CALL cudaGraphAddNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t*,
                                const cudaGraphEdgeData*, size_t dependencies, cudaGraphNodeParams* params) {
    FAIL_WHERE(dependencies != 0 || params->type != cudaGraphNodeTypeConditional ||
                   params->conditional.type != cudaGraphCondTypeWhile || params->conditional.size != 1 ||
                   emulation::conditions.count(params->conditional.handle) == 0,
               cudaErrorInvalidValue);
    CUgraphNode_st made;
    made.handle = params->conditional.handle;
    made.body = std::make_shared<CUgraph_st>();
    graph->nodes.push_back(made);
    static cudaGraph_t bodies[1];
    bodies[0] = made.body.get();
    params->conditional.phGraph_out = bodies;
    *node = &graph->nodes.back();
    return cudaSuccess;
}

EMULATION_CALL cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
    FAIL_WHERE(graph == nullptr, cudaErrorInvalidValue);
    *executable = new CUgraphExec_st{graph->nodes};
    ++emulation::live_objects;
    return cudaSuccess;
}

EMULATION_CALL cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    FAIL_WHERE(emulation::refused(stream), cudaErrorStreamCaptureUnsupported);
    return emulation::run(executable->nodes);
}

EMULATION_CALL cudaGraphExecDestroy(cudaGraphExec_t executable) {
    delete executable;
    --emulation::live_objects;
    return cudaSuccess;
}

EMULATION_CALL cudaGetLastError() { return cudaSuccess; }
