// Where the two sides of a branch meet: the immediate post-dominator of its block, found as the immediate dominator of the
// reversed control flow graph (the iteration of Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm").
#include <vector>

#include "decode.h"

namespace ptx {

namespace {

struct Graph {
  std::vector<int> first;     // instruction of each block
  std::vector<int> block_of;  // of each instruction
  std::vector<std::vector<int>> successors, predecessors;
  int exit;  // a block after the last
};

Graph build_graph(const std::vector<Instruction>& code) {
  const int n = static_cast<int>(code.size());
  std::vector<bool> leader(n + 1);
  leader[0] = true;
  for (int i = 0; i < n; ++i) {
    if (code[i].flow == Flow::kBranch) leader[code[i].target] = true;
    if (code[i].flow == Flow::kBranch || code[i].flow == Flow::kExit) leader[i + 1] = true;
  }
  Graph graph;
  graph.block_of.resize(n);
  for (int i = 0; i < n; ++i) {
    if (leader[i]) graph.first.push_back(i);
    graph.block_of[i] = static_cast<int>(graph.first.size()) - 1;
  }
  graph.exit = static_cast<int>(graph.first.size());
  graph.successors.resize(graph.exit + 1);
  graph.predecessors.resize(graph.exit + 1);
  for (int block = 0; block < graph.exit; ++block) {
    const int last = (block + 1 < graph.exit ? graph.first[block + 1] : n) - 1;
    const Instruction& in = code[last];
    std::vector<int>& to = graph.successors[block];
    if (in.flow == Flow::kBranch) to.push_back(graph.block_of[in.target]);
    if (in.flow == Flow::kExit) to.push_back(graph.exit);
    if (in.guarded || in.flow == Flow::kNone || in.flow == Flow::kBarrier) to.push_back(block + 1);
    for (const int successor : to) graph.predecessors[successor].push_back(block);
  }
  return graph;
}

// Blocks that reach the exit, each after the ones that it is post-dominated by, backwards from the exit; and their positions.
std::vector<int> reverse_post_order(const Graph& graph, std::vector<int>& position) {
  std::vector<int> order;
  std::vector<bool> seen(graph.exit + 1);
  std::vector<std::pair<int, size_t>> stack{{graph.exit, 0}};
  seen[graph.exit] = true;
  while (!stack.empty()) {
    auto& [block, next] = stack.back();
    if (next < graph.predecessors[block].size()) {
      const int predecessor = graph.predecessors[block][next++];
      if (!seen[predecessor]) {
        seen[predecessor] = true;
        stack.push_back({predecessor, 0});
      }
    } else {
      order.push_back(block);
      stack.pop_back();
    }
  }
  position.assign(graph.exit + 1, -1);
  for (size_t i = 0; i < order.size(); ++i) position[order[i]] = static_cast<int>(i);
  return {order.rbegin(), order.rend()};
}

}  // namespace

void find_reconvergence(Kernel& kernel) {
  const Graph graph = build_graph(kernel.code);
  std::vector<int> position;
  const std::vector<int> order = reverse_post_order(graph, position);
  std::vector<int> meets(graph.exit + 1, -1);  // immediate post-dominator, as far as known
  meets[graph.exit] = graph.exit;
  for (bool changed = true; changed;) {
    changed = false;
    for (const int block : order) {
      if (block == graph.exit) continue;
      int common = -1;
      for (int successor : graph.successors[block]) {
        if (meets[successor] < 0) continue;
        if (common < 0) {
          common = successor;
          continue;
        }
        while (common != successor) {
          while (position[common] < position[successor]) common = meets[common];
          while (position[successor] < position[common]) successor = meets[successor];
        }
      }
      changed = changed || meets[block] != common;
      meets[block] = common;
    }
  }
  for (size_t i = 0; i < kernel.code.size(); ++i) {
    const int meet = meets[graph.block_of[i]];
    kernel.code[i].reconvergence = meet < 0 || meet == graph.exit ? kNowhere : graph.first[meet];
  }
}

}  // namespace ptx
