// Streams and events. Work is done at once, or, when it is deferred, as late as the calls that wait for it allow: what a host
// forgot to wait for then has not happened.

#include "driver.hpp"

namespace shim {

namespace {

void run_next(Stream &stream) {
    Operation operation = std::move(stream.pending.front());
    stream.pending.pop_front();
    if (operation.mark != nullptr) {
        operation.mark->is_reached = true;
        operation.mark->reached_at = std::chrono::steady_clock::now();
        return;
    }
    Context &context = *stream.context;
    // A lost context does nothing any more.
    if (context.lost != SUCCESS) return;
    Outcome outcome = operation.work();
    if (outcome.status == 0) return;
    context.lost = CUresult(outcome.status);
    driver().last_error = outcome.why;
}

void run_stream(Stream &stream) {
    while (!stream.pending.empty()) run_next(stream);
}

// Its stream is alive: one that is destroyed does all of its work first.
void run_until(const Mark &mark) {
    while (!mark.is_reached) run_next(*mark.stream);
}

void add(Stream &stream, Operation operation) {
    stream.pending.push_back(std::move(operation));
    // As on a GPU, the launch succeeds, and the next call says what became of it.
    if (!driver().controls.is_deferred) run_stream(stream);
}

// Whether a stream is in the middle of a capture, which waiting for it ends.
bool is_capturing(Stream &stream) {
    if (stream.capture == nullptr) return false;
    stream.is_capture_invalid = true;
    return true;
}

CUresult find_event(const Context &context, CUevent handle, Event *&event) {
    event = driver().events.find(handle);
    if (event == nullptr || event->context != &context) return refuse(INVALID_HANDLE, "no such event in this context");
    return SUCCESS;
}

}  // namespace

CUresult find_stream(Context &context, CUstream handle, Stream *&stream) {
    stream = handle == nullptr ? context.null_stream.get() : driver().streams.find(handle);
    if (stream == nullptr || stream->context != &context) return refuse(INVALID_HANDLE, "no such stream in this context");
    return SUCCESS;
}

CUresult enqueue(Stream &stream, std::function<Outcome()> work) {
    if (stream.capture == nullptr) {
        add(stream, {std::move(work), nullptr});
        return SUCCESS;
    }
    if (stream.is_capture_invalid) return refuse(STREAM_CAPTURE_INVALIDATED, "the capture is invalid");
    stream.capture->work.push_back(std::move(work));
    return SUCCESS;
}

void run_all(Context &context) {
    run_stream(*context.null_stream);
    for (const auto &[handle, stream] : driver().streams.live) {
        if (stream->context == &context) run_stream(*stream);
    }
}

bool invalidate_captures(Context &context) {
    bool is_any = false;
    for (const auto &[handle, stream] : driver().streams.live) {
        if (stream->context == &context && is_capturing(*stream)) is_any = true;
    }
    return is_any;
}

bool disturb_captures(Context &context) {
    bool is_any = false;
    for (const auto &[handle, stream] : driver().streams.live) {
        bool is_own = stream->capturing_thread == std::this_thread::get_id();
        bool is_disturbed = stream->capture_mode == 0 || (stream->capture_mode == 1 && is_own);
        if (stream->context == &context && is_disturbed && is_capturing(*stream)) is_any = true;
    }
    return is_any;
}

}  // namespace shim

using namespace shim;

API CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
    return call_in_context(__func__, [&](Context &context) {
        if (stream == nullptr || flags > 1) return refuse(INVALID_VALUE, "no place for the stream, or unknown flags");
        *stream = driver().streams.add({&context, {}, nullptr, false});
        return SUCCESS;
    });
}

API CUresult cuStreamDestroy_v2(CUstream handle) {
    return call_to_free_in_context(__func__, [&](Context &context) {
        Stream *stream;
        if (handle == nullptr) return refuse(INVALID_HANDLE, "the null stream stays");
        if (CUresult status = find_stream(context, handle, stream)) return status;
        run_stream(*stream);
        driver().streams.remove(stream);
        return SUCCESS;
    });
}

API CUresult cuStreamSynchronize(CUstream handle) {
    return call_in_context(__func__, [&](Context &context) {
        Stream *stream;
        if (CUresult status = find_stream(context, handle, stream)) return status;
        if (is_capturing(*stream)) return refuse(STREAM_CAPTURE_UNSUPPORTED, "the stream is capturing");
        run_stream(*stream);
        return context.lost;
    });
}

// Also of a stream in another context than the current one.
API CUresult cuStreamGetCtx(CUstream handle, CUcontext *context) {
    return call_in_context(__func__, [&](Context &current) {
        Stream *stream = handle == nullptr ? current.null_stream.get() : driver().streams.find(handle);
        if (context == nullptr) return refuse(INVALID_VALUE, "no place for the context");
        if (stream == nullptr) return refuse(INVALID_HANDLE, "no such stream");
        *context = stream->context;
        return SUCCESS;
    });
}

// What is asked for does not get done by asking, but by the time it is asked for again.
API CUresult cuStreamQuery(CUstream handle) {
    return call_in_context(__func__, [&](Context &context) {
        Stream *stream;
        if (CUresult status = find_stream(context, handle, stream)) return status;
        if (is_capturing(*stream)) return refuse(STREAM_CAPTURE_UNSUPPORTED, "the stream is capturing");
        if (stream->pending.empty()) return SUCCESS;
        run_stream(*stream);
        return NOT_READY;
    });
}

API CUresult cuStreamWaitEvent(CUstream handle, CUevent event_handle, unsigned flags) {
    return call_in_context(__func__, [&](Context &context) {
        Stream *stream;
        Event *event;
        if (CUresult status = find_stream(context, handle, stream)) return status;
        if (CUresult status = find_event(context, event_handle, event)) return status;
        if (flags != 0) return refuse(INVALID_VALUE, "flags are 0");
        if (stream->capture != nullptr) return refuse(NOT_SUPPORTED, "the shim captures no events");
        // An event that was never recorded has happened.
        if (event->mark == nullptr) return SUCCESS;
        return enqueue(*stream, [mark = event->mark] {
            run_until(*mark);
            return Outcome{0, ""};
        });
    });
}

API CUresult cuEventCreate(CUevent *event, unsigned flags) {
    return call_in_context(__func__, [&](Context &context) {
        if (event == nullptr || flags > 7) return refuse(INVALID_VALUE, "no place for the event, or unknown flags");
        *event = driver().events.add({&context, (flags & 2) == 0, nullptr});
        return SUCCESS;
    });
}

API CUresult cuEventDestroy_v2(CUevent handle) {
    return call_to_free_in_context(__func__, [&](Context &context) {
        Event *event;
        if (CUresult status = find_event(context, handle, event)) return status;
        driver().events.remove(event);
        return SUCCESS;
    });
}

API CUresult cuEventRecord(CUevent event_handle, CUstream handle) {
    return call_in_context(__func__, [&](Context &context) {
        Stream *stream;
        Event *event;
        if (CUresult status = find_event(context, event_handle, event)) return status;
        if (CUresult status = find_stream(context, handle, stream)) return status;
        if (stream->capture != nullptr) return refuse(NOT_SUPPORTED, "the shim captures no events");
        event->mark = std::make_shared<Mark>(Mark{stream, false, {}});
        add(*stream, {nullptr, event->mark});
        return SUCCESS;
    });
}

API CUresult cuEventSynchronize(CUevent handle) {
    return call_in_context(__func__, [&](Context &context) {
        Event *event;
        if (CUresult status = find_event(context, handle, event)) return status;
        if (event->mark != nullptr) run_until(*event->mark);
        return context.lost;
    });
}

// As cuStreamQuery.
API CUresult cuEventQuery(CUevent handle) {
    return call_in_context(__func__, [&](Context &context) {
        Event *event;
        if (CUresult status = find_event(context, handle, event)) return status;
        if (event->mark == nullptr || event->mark->is_reached) return SUCCESS;
        run_until(*event->mark);
        return NOT_READY;
    });
}

// The processor's time between two events, in milliseconds.
API CUresult cuEventElapsedTime(float *milliseconds, CUevent from_handle, CUevent to_handle) {
    return call_in_context(__func__, [&](Context &context) {
        Event *from, *to;
        if (milliseconds == nullptr) return refuse(INVALID_VALUE, "no place for the time");
        if (CUresult status = find_event(context, from_handle, from)) return status;
        if (CUresult status = find_event(context, to_handle, to)) return status;
        bool are_recorded = from->mark != nullptr && to->mark != nullptr;
        if (!are_recorded || !from->has_time || !to->has_time) {
            return refuse(INVALID_HANDLE, "an event was made without time or never recorded");
        }
        if (!from->mark->is_reached || !to->mark->is_reached) return NOT_READY;
        std::chrono::duration<float, std::milli> time = to->mark->reached_at - from->mark->reached_at;
        *milliseconds = time.count();
        return SUCCESS;
    });
}
