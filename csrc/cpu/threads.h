// Threads of a call: a team, its barrier, and work handed out in order.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <type_traits>

#if defined(_OPENMP)
#include <omp.h>
#else
#include <pthread.h>

#include <vector>
#endif

namespace lora_ops {

// A call that may be told to end early: its thread asks `wanted` now and then. What it has written by then is worth nothing.
class Call {
 public:
  explicit Call(bool (*wanted)()) : wanted_(wanted), before_(current()) { current() = this; }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  ~Call() { current() = before_; }

  static Call*& current() {
    static thread_local Call* call = nullptr;
    return call;
  }
  bool stopped() const { return stopped_.load(std::memory_order_relaxed); }
  void ask() {
    const auto now = std::chrono::steady_clock::now();
    if (now - asked_ < std::chrono::milliseconds(100)) return;
    if (!wanted_()) stopped_ = true;
    asked_ = std::chrono::steady_clock::now();
  }

 private:
  bool (*const wanted_)();
  Call* const before_;
  std::atomic<bool> stopped_{false};
  std::chrono::steady_clock::time_point asked_ = std::chrono::steady_clock::now();
};

// Whether this process is a fork. libgomp's threads are not in it, and the thread that forked would wait for them.
bool after_fork();

#if defined(_OPENMP)

// body(thread) on every thread of a team, the caller's among them. `sync` below separates its phases.
template <class F>
void team(int threads, const F& body) {
#pragma omp parallel num_threads(threads)
  body(omp_get_thread_num());
}
inline void sync() {
#pragma omp barrier
}

#else  // the same without OpenMP, in words that ThreadSanitizer understands

inline pthread_barrier_t*& current_barrier() {
  static thread_local pthread_barrier_t* barrier = nullptr;
  return barrier;
}
template <class F>
void team(int threads, const F& body) {
  pthread_barrier_t barrier;
  pthread_barrier_init(&barrier, nullptr, threads);
  const auto run = [&](int thread) {
    pthread_barrier_t* const before = current_barrier();
    current_barrier() = &barrier;
    body(thread);
    current_barrier() = before;
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(run, i);
  run(0);
  for (auto& other : others) other.join();
  pthread_barrier_destroy(&barrier);
}
inline void sync() {
  pthread_barrier_wait(current_barrier());
}

#endif

// After a fork a new thread leads the team: libgomp gives it threads of its own.
template <class F>
void parallel(int threads, const F& body) {
  if (threads > 1 && after_fork()) return std::thread([&] { team(threads, body); }).join();
  team(threads, body);
}

// Work handed out in order, one index at a time. task(i, next): `next` is what the same thread will be given after i (it may
// lie behind the end), so that its operands can be fetched meanwhile.
class Tasks {
 public:
  explicit Tasks(int64_t count) : count_(count), call_(Call::current()) {}
  template <class F>
  void run(const F& task) {
    Call* const own = Call::current();  // none on the other threads of a team
    for (int64_t i = next_++, next; i < count_ && !(call_ && call_->stopped()); i = next) {
      next = next_++;
      if constexpr (std::is_invocable_v<F, int64_t, int64_t>) {
        task(i, next);
      } else {
        task(i);
      }
      if (own) own->ask();
    }
  }

 private:
  const int64_t count_;
  Call* const call_;
  std::atomic<int64_t> next_{0};
};

// body(i) for each of [0, count), neighbours on one thread.
template <class F>
void parallel_for(int threads, int64_t count, const F& body) {
  threads = threads < 1 ? 1 : threads;
  const int64_t share = (count + 8 * threads - 1) / (8 * threads);  // of a task: of every thread's work, an eighth
  Tasks tasks(share ? (count + share - 1) / share : 0);
  parallel(threads, [&](int) {
    tasks.run([&](int64_t t) {
      for (int64_t i = t * share; i < (t + 1) * share && i < count; ++i) body(i);
    });
  });
}

}  // namespace lora_ops
