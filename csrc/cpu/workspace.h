// Scratch memory of a call: bump allocation out of chunks that the calling thread keeps, so that a training step does not
// fault the same pages in again at every layer. Chunks are huge-page aligned: panels stream without TLB misses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

namespace lora_ops {

class Workspace {
 public:
  Workspace() : nested_(in_use()), chunks_(nested_ ? own_ : kept()) {
    in_use() = true;
    for (Chunk& c : chunks_) {
      c.used = 0;
      ASAN_POISON_MEMORY_REGION(c.data.get(), c.size);
    }
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  // More than one chunk means that the last call outgrew the first: the next one starts with a chunk that holds it all.
  ~Workspace() {
    if (nested_) return;
    in_use() = false;
    if (chunks_.size() < 2) return;
    size_t total = 0;
    for (const Chunk& c : chunks_) total += c.size;
    chunks_.clear();
    grow(total);
  }

  float* floats(int64_t count) { return reinterpret_cast<float*>(bytes(static_cast<size_t>(count) * sizeof(float))); }
  uint32_t* words(int64_t count) { return reinterpret_cast<uint32_t*>(bytes(static_cast<size_t>(count) * sizeof(uint32_t))); }

 private:
  static constexpr size_t kHugePage = size_t{1} << 21;

  struct Free {
    void operator()(char* p) const { std::free(p); }  // which lifts the poison
  };
  struct Chunk {
    std::unique_ptr<char, Free> data;
    size_t size, used;
  };

  static std::vector<Chunk>& kept() {
    static thread_local std::vector<Chunk> chunks;
    return chunks;
  }

  // A signal's handler may call a kernel in the midst of another's call (released.h).
  static bool& in_use() {
    static thread_local bool in_use = false;
    return in_use;
  }

  void grow(size_t size) {
    size = (size + kHugePage - 1) / kHugePage * kHugePage;
    char* data = static_cast<char*>(std::aligned_alloc(kHugePage, size));
    if (!data) throw std::bad_alloc();
#if defined(__linux__)
    madvise(data, size, MADV_HUGEPAGE);
#endif
    ASAN_POISON_MEMORY_REGION(data, size);
    chunks_.push_back(Chunk{std::unique_ptr<char, Free>(data), size, 0});
  }

  char* bytes(size_t size) {
    [[maybe_unused]] const size_t wanted = size;  // by ASan
    size = (size + 63) / 64 * 64 + 64;            // a line between neighbours
    if (chunks_.empty() || chunks_.back().size - chunks_.back().used < size) grow(size);
    Chunk& c = chunks_.back();
    char* p = c.data.get() + c.used;
    c.used += size;
    ASAN_UNPOISON_MEMORY_REGION(p, wanted);
    return p;
  }

  const bool nested_;
  std::vector<Chunk> own_;
  std::vector<Chunk>& chunks_;
};

}  // namespace lora_ops
