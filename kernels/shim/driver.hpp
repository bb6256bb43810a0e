// What the driver keeps, and how every function of it begins.

#pragma once

#include <chrono>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "driver_api.hpp"
#include "grid.hpp"

namespace shim {

constexpr size_t SHARED_BYTES = 48 << 10;
constexpr size_t SHARED_BYTES_OPT_IN = 163 << 10;

// A place in a stream's work that an event was put at.
struct Mark {
    Stream *stream;
    bool is_reached;
    std::chrono::steady_clock::time_point reached_at;
};

// What a stream does when its turn comes: work, or reaching a mark.
struct Operation {
    std::function<Outcome()> work;
    std::shared_ptr<Mark> mark;
};

struct Context {
    CUdevice device;
    // Holders of the device's primary context; 0 for one that was made by itself.
    uint32_t references;
    // The error after which every call fails.
    CUresult lost;
    // What calls mean by a null stream.
    std::unique_ptr<Stream> null_stream;
};

struct Function {
    const Kernel *kernel;
    size_t shared_limit;
    // As in Entry.
    bool waits;
};

// What a module's image says of a kernel.
struct Entry {
    // Whether its native code waits for the grid before it.
    bool waits;
};

struct Module {
    Context *context;
    bool has_every_kernel;
    std::map<std::string, Entry> entries;
    std::map<std::string, std::unique_ptr<Function>> functions;
};

struct Graph {
    Context *context;
    std::vector<std::function<Outcome()>> work;
};

struct GraphExec {
    Context *context;
    std::shared_ptr<const std::vector<std::function<Outcome()>>> work;
};

struct Stream {
    Context *context;
    std::deque<Operation> pending;
    // Between the begin and the end of a capture.
    std::unique_ptr<Graph> capture;
    bool is_capture_invalid;
    int capture_mode = 0;
    std::thread::id capturing_thread;
    // Whether kernels, or graphs of them, were launched here.
    bool has_computed = false;
};

struct Event {
    Context *context;
    bool has_time;
    // None before the event is recorded.
    std::shared_ptr<Mark> mark;
};

struct Allocation {
    Context *context;
    size_t bytes;
};

// The objects of one kind, by their handles.
template <typename T>
struct Handles {
    std::map<const T *, std::unique_ptr<T>> live;

    T *add(T value) {
        auto owned = std::make_unique<T>(std::move(value));
        T *handle = owned.get();
        live.emplace(handle, std::move(owned));
        return handle;
    }

    // Null where there is no such object.
    T *find(const T *handle) const {
        auto found = live.find(handle);
        return found == live.end() ? nullptr : found->second.get();
    }

    bool remove(const T *handle) { return live.erase(handle) > 0; }

    void remove_of(const Context *context) {
        for (auto next = live.begin(); next != live.end();) {
            next = next->second->context == context ? live.erase(next) : std::next(next);
        }
    }
};

// What tests set; controls.cpp.
struct Controls {
    uint64_t fail_at = 0;
    CUresult fail_with = SUCCESS;
    bool is_deferred = false;
    int device_count = 1;
    int driver_version = 12010;
    int compute_capability = 80;
    size_t total_memory = size_t(4) << 30;
    // What native code is refused with, where it is.
    CUresult refuse_native = SUCCESS;
    uint64_t calls = 0;
    uint64_t launches = 0;
    uint64_t dependent_launches = 0;
    uint64_t native_modules = 0;
    uint64_t bytes_to_host = 0;
};

struct Driver {
    std::mutex lock;
    Controls controls;
    std::string last_error;
    bool is_initialised = false;
    std::map<const Context *, std::unique_ptr<Context>> contexts;
    std::map<CUdevice, Context *> primary;
    // By address.
    std::map<uintptr_t, Allocation> memory, pinned;
    Handles<Module> modules;
    Handles<Stream> streams;
    Handles<Event> events;
    Handles<Graph> graphs;
    Handles<GraphExec> executables;
    // The function that is being called.
    const char *calling = "";
};

// Never taken down: other threads may call while the process ends.
Driver &driver();

// Puts down why a call fails.
CUresult refuse(CUresult status, const std::string &why);

// The current context of the calling thread, where it is alive.
Context *current_context();

// Errors that a context does not recover from.
bool is_sticky(CUresult status);

// Counts the call, and fails if it was told to.
CUresult begin_call(const char *function);

// That there is a current context which has not been lost.
CUresult need_context(Context *&context);

// A function of the driver. No exception leaves it.
template <typename Body>
CUresult call(const char *function, Body body) {
    std::lock_guard<std::mutex> guard(driver().lock);
    if (CUresult status = begin_call(function)) return status;
    try {
        return body();
    } catch (const std::bad_alloc &) {
        return refuse(OUT_OF_MEMORY, "the host has no memory");
    }
}

// One that needs a current context.
template <typename Body>
CUresult call_in_context(const char *function, Body body) {
    return call(function, [&] {
        Context *context;
        CUresult status = need_context(context);
        return status != SUCCESS ? status : body(*context);
    });
}

// One that gives something back: it does so even where it fails, since a host cannot try again.
template <typename Body>
CUresult call_to_free(const char *function, Body body) {
    std::lock_guard<std::mutex> guard(driver().lock);
    CUresult failed = begin_call(function);
    CUresult status = body();
    return failed != SUCCESS ? failed : status;
}

// The same, of something in the current context.
template <typename Body>
CUresult call_to_free_in_context(const char *function, Body body) {
    return call_to_free(function, [&] {
        Context *context = current_context();
        if (context == nullptr) return refuse(INVALID_CONTEXT, "no context is current");
        CUresult lost = context->lost;
        CUresult status = body(*context);
        return lost != SUCCESS ? lost : status;
    });
}

// Finds the kernels of a module's image, for this device and driver (images.cpp).
CUresult read_image(const void *image, Module &module);

// Streams, for the other files (streams.cpp).

// The stream behind a handle, a null one too; it has to be the current context's.
CUresult find_stream(Context &context, CUstream handle, Stream *&stream);
// Puts work into a stream, or into the graph that it captures.
CUresult enqueue(Stream &stream, std::function<Outcome()> work);
// Does all work of a context. What goes wrong loses the context.
void run_all(Context &context);
// Drops captures in a context, all of them; whether there was one.
bool invalidate_captures(Context &context);
// Drops those that a call of this thread which may wait disturbs: by their mode all (0), those of this thread (1), none (2).
bool disturb_captures(Context &context);

// Frees all that is in a context, and the context.
void destroy(Context &context);

}  // namespace shim
