// S (M, r) = drop(x) A_iᵀ in the rows of segment i (segments.h), zero in columns beyond its rank
//
// lora_down.cuh's block for every tile of a segment's rows, counted from its first row on: x is read once, whatever the segments,
// and no adapter meets another's rows. Where the tiles of segment i begin in the grid follows from first_row alone, without a
// sum over the segments before it: at first_row[i] / 64 + i, since from there to the next segment's there are at least as many
// blocks as it has tiles. The few in excess have nothing to do.
#include "lora_down.cuh"
#include "segments.cuh"

namespace lora_ops {
namespace {

struct SegmentedArgs : LoraDownArgs {
  Segments segments;
};

template <typename T, typename Adapter, int kRanks, bool kVector>
__global__ void __launch_bounds__(kThreads, 3) lora_down_segments_kernel(const SegmentedArgs args) {
  const int32_t* const first_row = args.segments.first_row;
  const int block = blockIdx.x;
  const int segment = last_segment(args.segments, [&](int i) { return first_row[i] / kTileRows + i <= block; });
  const int first = first_row[segment], end = first_row[segment + 1];
  const int row0 = first + (block - (first / kTileRows + segment)) * kTileRows;
  if (row0 >= end) return;
  const SegmentAdapter adapter = args.segments.adapters[segment];
  const int tiles = static_cast<int>(blockIdx.z) * kRanks < adapter.rank ? tiles_of_block(args.split) : 0;
  lora_down_rows<T, Adapter, kRanks, kVector>(args, row0, end, adapter.lora_A, adapter.rank, tiles);
}

struct LoraDownSegmentsKernel {
  template <typename T, typename Adapter, int kRanks, bool kVector>
  static auto instance() {
    return lora_down_segments_kernel<T, Adapter, kRanks, kVector>;
  }
};

int64_t row_blocks(const LoraDown& op, const Segments& segments) {
  return op.M / kTileRows + segments.count;
}

}  // namespace

int64_t workspace_bytes(const LoraDown& op, const Segments& segments) {
  const Split split = split_of(op, row_blocks(op, segments));
  return split.count == 1 ? 0 : split.count * op.M * op.r * static_cast<int64_t>(sizeof(float));
}

void launch_lora_down_segments(const LoraDown& op, const Segments& segments, void* stream) {
  if (op.M == 0) return;
  const char* name = "lora_down_segments";
  require(segments.count >= 1 && op.M <= INT32_MAX / 2, name, "takes one segment or more of 2^30 rows together",
          shapes("M", op.M, "segments", segments.count));
  SegmentedArgs args{{op, split_of(op, row_blocks(op, segments)), nullptr}, segments};
  args.sums = args.split.count == 1 ? op.S : op.workspace;
  const bool vector =
      vectors(op.x, op.x_row_stride, op.x_dtype) && segments.aligned && op.K * size_of(op.adapter_dtype) % kVectorBytes == 0;
  launch_rows<LoraDownSegmentsKernel>(name, args, row_blocks(op, segments), vector, stream);
}

}  // namespace lora_ops

extern "C" int64_t lora_ops_lora_down_segments_workspace_bytes(const lora_ops::LoraDown* params,
                                                               const lora_ops::Segments* segments) {
  return lora_ops::workspace_bytes(*params, *segments);
}

extern "C" int lora_ops_lora_down_segments(const lora_ops::LoraDown* params, const lora_ops::Segments* segments, void* stream) {
  return lora_ops::report_errors([&] { lora_ops::launch_lora_down_segments(*params, *segments, stream); });
}
