#include "threads.h"

#include <pthread.h>

namespace lora_ops {
namespace {

bool forked = false;  // written where there is but one thread
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

bool after_fork() {
  return forked;
}

}  // namespace lora_ops
