// Graphs: the work that a stream was given while it captured, to be given to a stream again.

#include "driver.hpp"

using namespace shim;

// While a stream captures, calls that may wait for work are refused as its mode says (disturb_captures).
API CUresult cuStreamBeginCapture_v2(CUstream handle, int mode) {
    return call_in_context(__func__, [&](Context &context) {
        Stream *stream;
        if (handle == nullptr) return refuse(STREAM_CAPTURE_UNSUPPORTED, "the null stream does not capture");
        if (CUresult status = find_stream(context, handle, stream)) return status;
        if (mode < 0 || mode > 2) return refuse(INVALID_VALUE, "mode " + std::to_string(mode));
        if (stream->capture != nullptr) return refuse(ILLEGAL_STATE, "the stream captures already");
        stream->capture = std::make_unique<Graph>(Graph{&context, {}});
        stream->is_capture_invalid = false;
        stream->capture_mode = mode;
        stream->capturing_thread = std::this_thread::get_id();
        return SUCCESS;
    });
}

API CUresult cuStreamEndCapture(CUstream handle, CUgraph *graph) {
    return call(__func__, [&] {
        Context *current, *alive = current_context();
        Stream *stream;
        if (CUresult status = need_context(current)) {
            // A lost context keeps no capture, which would be in the way of those who free.
            if (alive != nullptr && find_stream(*alive, handle, stream) == SUCCESS) stream->capture.reset();
            return status;
        }
        Context &context = *current;
        if (CUresult status = find_stream(context, handle, stream)) return status;
        if (graph == nullptr) return refuse(INVALID_VALUE, "no place for the graph");
        if (stream->capture == nullptr) return refuse(STREAM_CAPTURE_UNMATCHED, "the stream does not capture");
        if (stream->capture_mode != 2 && stream->capturing_thread != std::this_thread::get_id()) {
            return refuse(STREAM_CAPTURE_WRONG_THREAD, "another thread began the capture");
        }
        auto captured = std::move(stream->capture);
        *graph = nullptr;
        if (stream->is_capture_invalid) return refuse(STREAM_CAPTURE_INVALIDATED, "the capture is invalid");
        *graph = driver().graphs.add(std::move(*captured));
        return SUCCESS;
    });
}

API CUresult cuGraphInstantiateWithFlags(CUgraphExec *executable, CUgraph handle, unsigned long long) {
    return call_in_context(__func__, [&](Context &context) {
        Graph *graph = driver().graphs.find(handle);
        if (executable == nullptr) return refuse(INVALID_VALUE, "no place for the graph");
        if (graph == nullptr || graph->context != &context) return refuse(INVALID_VALUE, "no such graph");
        auto work = std::make_shared<const std::vector<std::function<Outcome()>>>(graph->work);
        *executable = driver().executables.add({&context, std::move(work)});
        return SUCCESS;
    });
}

API CUresult cuGraphLaunch(CUgraphExec handle, CUstream stream_handle) {
    return call_in_context(__func__, [&](Context &context) {
        Stream *stream;
        GraphExec *executable = driver().executables.find(handle);
        if (executable == nullptr || executable->context != &context) return refuse(INVALID_VALUE, "no such graph");
        if (CUresult status = find_stream(context, stream_handle, stream)) return status;
        stream->has_computed |= stream->capture == nullptr;
        return enqueue(*stream, [all = executable->work] {
            for (const auto &work : *all) {
                Outcome outcome = work();
                if (outcome.status != 0) return outcome;
            }
            return Outcome{0, ""};
        });
    });
}

API CUresult cuGraphExecDestroy(CUgraphExec handle) {
    return call_to_free_in_context(__func__, [&](Context &) {
        return driver().executables.remove(handle) ? SUCCESS : refuse(INVALID_VALUE, "no such graph");
    });
}

API CUresult cuGraphDestroy(CUgraph handle) {
    return call_to_free_in_context(__func__, [&](Context &) {
        return driver().graphs.remove(handle) ? SUCCESS : refuse(INVALID_VALUE, "no such graph");
    });
}
