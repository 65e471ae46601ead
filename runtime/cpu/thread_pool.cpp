#include "thread_pool.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace sparsify {
namespace {

using Task = void (*)(void*, size_t);

class Pool {
 public:
  // Throws std::runtime_error if the system refuses a thread. Fewer would do, but nobody would know why it is slow.
  explicit Pool(int threads) : threads_(threads) {
    try {
      for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
    } catch (const std::exception& error) {
      const size_t started = workers_.size() + 1;
      end();
      throw std::runtime_error("the system gives " + std::to_string(started) + " of " + std::to_string(threads) +
                               " threads: " + error.what());
    }
  }

  ~Pool() { end(); }

  int threads() const { return threads_; }

  // What the first task to fail throws, when all have ended: the others may still use `arg` until then.
  void run(size_t count, Task task, void* arg) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = task;
      arg_ = arg;
      count_ = count;
      next_.store(0, std::memory_order_relaxed);
      failure_ = nullptr;
      busy_ = int(workers_.size());
      ++job_;
    }
    wake_.notify_all();
    take_tasks();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

 private:
  void end() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  // Never throws: of a worker that would end the process, and of the caller leave workers behind that still read `arg`.
  void take_tasks() {
    try {
      for (size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) task_(arg_, i);
    } catch (...) {
      next_.store(count_, std::memory_order_relaxed);
      std::lock_guard<std::mutex> lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
    }
  }

  void work() {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stop_ || job_ != seen; });
      if (stop_) return;
      seen = job_;
      lock.unlock();
      take_tasks();
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  const int threads_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Task task_ = nullptr;
  void* arg_ = nullptr;
  size_t count_ = 0;
  std::atomic<size_t> next_{0};
  int busy_ = 0;
  std::exception_ptr failure_;
  uint64_t job_ = 0;
  bool stop_ = false;
};

std::atomic<int> wanted_threads{0};

// Never freed at exit: static destructors run while other libraries' threads may still call us.
struct Shared {
  std::mutex in_use;
  Pool* pool = nullptr;
  pid_t owner = 0;
};
Shared& shared() {
  static Shared* the_one = new Shared;
  return *the_one;
}

void run(void*, size_t count, Task task, void* arg) {
  Shared& s = shared();
  std::unique_lock<std::mutex> lock(s.in_use, std::try_to_lock);
  const int threads = num_threads();
  if (!lock.owns_lock() || threads == 1) {  // another Python thread has the workers: do it here
    for (size_t i = 0; i < count; ++i) task(arg, i);
    return;
  }
  if (s.pool && s.owner != getpid()) s.pool = nullptr;  // forked: the workers stayed in the parent
  if (s.pool && s.pool->threads() != threads) {
    delete s.pool;
    s.pool = nullptr;
  }
  if (!s.pool) {
    s.pool = new Pool(threads);
    s.owner = getpid();
  }
  s.pool->run(count, task, arg);
}

}  // namespace

Parallel thread_pool() { return {nullptr, run}; }

void set_num_threads(int threads) { wanted_threads = threads; }

int num_threads() {
  if (const int wanted = wanted_threads) return wanted;
  const unsigned cores = std::thread::hardware_concurrency();
  return cores ? int(cores) : 1;
}

}  // namespace sparsify
