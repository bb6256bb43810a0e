// What tests ask the shim for. A host knows none of it.

#include "driver.hpp"

using namespace shim;

namespace {

template <typename Body>
auto locked(Body body) {
    std::lock_guard<std::mutex> guard(driver().lock);
    return body(driver().controls);
}

}  // namespace

// The `nth` call from now on fails with `status`; never where nth is 0. Statuses that a context does not recover from fail every
// later call in it, while frees still free.
API void gemmoe_shim_fail(uint64_t nth, int status) {
    locked([&](Controls &controls) {
        controls.fail_at = nth == 0 ? 0 : controls.calls + nth;
        controls.fail_with = CUresult(status);
    });
}

// In which order lanes, warps and blocks run: 0 forward, 1 reverse, 2 random by the seed.
API void gemmoe_shim_order(int kind, uint64_t seed) {
    locked([&](Controls &) { set_order(Order(kind), seed); });
}

// Whether work waits until a call waits for it.
API void gemmoe_shim_deferred(int is_deferred) {
    locked([&](Controls &controls) { controls.is_deferred = is_deferred != 0; });
}

API void gemmoe_shim_device_count(int count) {
    locked([&](Controls &controls) {
        controls.device_count = count;
        // Whether there is one is found out by cuInit.
        driver().is_initialised = false;
    });
}

// 12010 for 12.1.
API void gemmoe_shim_driver_version(int version) {
    locked([&](Controls &controls) { controls.driver_version = version; });
}

// 80 for 8.0.
API void gemmoe_shim_compute_capability(int capability) {
    locked([&](Controls &controls) { controls.compute_capability = capability; });
}

// Native code, of which it is otherwise asked whether the device runs it; 0 refuses none.
API void gemmoe_shim_refuse_native(int status) {
    locked([&](Controls &controls) { controls.refuse_native = CUresult(status); });
}

// Of each device.
API void gemmoe_shim_total_memory(size_t bytes) {
    locked([&](Controls &controls) { controls.total_memory = bytes; });
}

// Of the driver, but for those that name errors.
API uint64_t gemmoe_shim_calls() {
    return locked([](Controls &controls) { return controls.calls; });
}

// That succeeded, of kernels; those of graphs count when they are captured.
API uint64_t gemmoe_shim_launches() {
    return locked([](Controls &controls) { return controls.launches; });
}

// Of those, launches of kernels that may begin while the grid before them runs.
API uint64_t gemmoe_shim_dependent_launches() {
    return locked([](Controls &controls) { return controls.dependent_launches; });
}

// Modules of native code that were loaded.
API uint64_t gemmoe_shim_native_modules() {
    return locked([](Controls &controls) { return controls.native_modules; });
}

// Copied from the device, once the copies were done.
API uint64_t gemmoe_shim_bytes_to_host() {
    return locked([](Controls &controls) { return controls.bytes_to_host; });
}

// Of the device and pinned ones.
API uint64_t gemmoe_shim_live_allocations() {
    return locked([](Controls &) { return uint64_t(driver().memory.size() + driver().pinned.size()); });
}

// Contexts, modules, streams, events and graphs.
API uint64_t gemmoe_shim_live_objects() {
    return locked([](Controls &) {
        Driver &all = driver();
        size_t others = all.events.live.size() + all.graphs.live.size() + all.executables.live.size();
        return uint64_t(all.contexts.size() + all.modules.live.size() + all.streams.live.size() + others);
    });
}

// Streams that are alive and had kernels, or graphs of them, launched on them.
API uint64_t gemmoe_shim_computing_streams() {
    return locked([](Controls &) {
        uint64_t count = 0;
        for (const auto &[handle, stream] : driver().streams.live) count += stream->has_computed;
        return count;
    });
}

// Why the last call failed that did, or what a kernel did wrong. Stays until this thread asks again.
API const char *gemmoe_shim_last_error_text() {
    thread_local std::string text;
    locked([](Controls &) { text = driver().last_error; });
    return text.c_str();
}

// Controls and counters as in the beginning, and no context is lost. What is alive stays.
API void gemmoe_shim_reset() {
    locked([](Controls &controls) {
        controls = Controls();
        driver().last_error.clear();
        for (auto &[handle, context] : driver().contexts) context->lost = SUCCESS;
        set_order(Order::forward, 0);
    });
}
