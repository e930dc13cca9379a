// A loop over independent tasks on several threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

// Calls function(task, thread) for every task, with thread in [0, threads). Which thread takes which task is left open,
// so a task's result must not depend on its thread.
//
// Plain threads and not OpenMP: torch wheels bring an OpenMP runtime under a name of their own, so ours could be a
// second one, with workers that spin between calls on the cores that torch needs. Threads that end with the call leave nothing
// behind, and need nothing at build time. The price is that torch's own workers still spin for a few milliseconds after
// its last operation; tasks are taken one by one, so most of them go to the undisturbed thread.
template <class Function>
void parallel_for(int64_t tasks, int threads, const Function& function) {
    std::atomic<int64_t> next{0};
    std::atomic<int> arrived{0};
    const auto work = [&] {
        const int thread = arrived.fetch_add(1);
        for (int64_t task; (task = next.fetch_add(1)) < tasks;) function(task, thread);
    };
    std::vector<std::thread> helpers;
    try {
        while ((int64_t)helpers.size() + 1 < (tasks < threads ? tasks : threads)) helpers.emplace_back(work);
    } catch (const std::system_error&) {  // no more threads available: those that started share the tasks
    }
    work();
    for (auto& helper : helpers) helper.join();
}
