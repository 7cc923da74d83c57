#include "counters.h"

#include <algorithm>

namespace ptx {

namespace {

constexpr int kBanks = 32, kBankBytes = 4, kSectorBytes = 32, kWavefrontBytes = kBanks * kBankBytes;

}  // namespace

void count_wavefronts(Counts& counts, const uint64_t* addresses, uint32_t active, int bytes) {
  const int lanes = std::min(32, kWavefrontBytes / std::max(bytes, kBankBytes));
  for (int first = 0; first < 32; first += lanes) {
    uint64_t words[kBanks][32];
    int used[kBanks] = {};
    int most = 0;
    for (int lane = first; lane < first + lanes; ++lane) {
      if ((active >> lane & 1) == 0) continue;
      const uint64_t last = (addresses[lane] + bytes - 1) / kBankBytes;
      for (uint64_t word = addresses[lane] / kBankBytes; word <= last; ++word) {
        const int bank = word % kBanks;
        uint64_t* const end = words[bank] + used[bank];
        if (std::find(words[bank], end, word) != end) continue;
        *end = word;
        most = std::max(most, ++used[bank]);
      }
    }
    counts.wavefronts += most;
    counts.ideal_wavefronts += most > 0;
  }
}

void count_sectors(Counts& counts, const uint64_t* addresses, uint32_t active, int bytes) {
  uint64_t sorted[32];
  int n = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (active >> lane & 1) sorted[n++] = addresses[lane];
  }
  if (!std::is_sorted(sorted, sorted + n)) std::sort(sorted, sorted + n);
  uint64_t next_byte = 0, next_sector = 0, wanted = 0;
  for (int i = 0; i < n; ++i) {
    const uint64_t end = sorted[i] + bytes;
    wanted += end - std::min(std::max(sorted[i], next_byte), end);
    next_byte = std::max(next_byte, end);
    const uint64_t first = std::max(sorted[i] / kSectorBytes, next_sector), last = (end - 1) / kSectorBytes;
    if (first > last) continue;
    counts.sectors += last - first + 1;
    next_sector = last + 1;
  }
  counts.ideal_sectors += (wanted + kSectorBytes - 1) / kSectorBytes;
  counts.global_bytes += wanted;
}

}  // namespace ptx
