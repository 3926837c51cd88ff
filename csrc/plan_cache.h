// One way to run each problem, chosen at its first call and kept: the key is the problem as a row of integers.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "runtime.h"

namespace sfast {

// One complete implementation of a problem: Pointers hold the addresses of its operands.
template <typename Pointers>
struct Way {
  std::string name;
  int64_t workspace = 0;  // bytes
  std::function<void(const Pointers&, void* workspace, cudaStream_t)> run;
};

template <size_t kFields, typename Pointers>
class PlanCache {
 public:
  using Ways = std::vector<Way<Pointers>>;

  // Runs the fastest of the ways that `propose(first_only)` makes, best guess first, or raises what choosing raised.
  // Measuring needs the operands' memory: `pointers.out` is overwritten, the rest is only read. While the stream is
  // being captured nothing can be measured: then the first guess serves, and the choice is made again later.
  void run(const std::array<int64_t, kFields>& key, const std::string& description, int64_t device, cudaStream_t stream,
           const Pointers& pointers, const std::function<Ways(bool first_only)>& propose) {
    Entry& entry = find(key);
    const std::lock_guard<std::mutex> lock(entry.mutex);
    const bool may_measure = !is_capturing(stream);
    if (!entry.chosen || (may_measure && !entry.measured))
      choose(entry, description, device, stream, pointers, propose);
    SFAST_CHECK(entry.error.empty(), entry.error);
    const Workspace workspace(entry.way.workspace, device);
    entry.way.run(pointers, workspace.get(), stream);
  }

  // One line for each problem so far.
  std::string describe() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::ostringstream text;
    for (auto& [key, entry] : entries_) {
      const std::lock_guard<std::mutex> entry_lock(entry.mutex);
      if (entry.chosen) text << entry.story << "\n";
    }
    return text.str();
  }

 private:
  struct Entry {
    std::mutex mutex;
    bool chosen = false, measured = false;
    Way<Pointers> way;
    std::string error, story;
  };

  Entry& find(const std::array<int64_t, kFields>& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return entries_[key];  // a map's nodes never move
  }

  void choose(Entry& entry, const std::string& description, int64_t device, cudaStream_t stream,
              const Pointers& pointers, const std::function<Ways(bool first_only)>& propose) {
    constexpr float kTie = 1.02f;
    const auto begin = std::chrono::steady_clock::now();
    const RelaxedCapture relaxed;
    const bool measure = !is_capturing(stream);
    std::ostringstream story;
    Ways ways;
    size_t best = 0;
    try {
      ways = propose(!measure);
      SFAST_CHECK(!ways.empty(), "no kernel");
    } catch (const std::exception& error) {
      return refuse(entry, description, error.what());
    }
    story << description << ": " << ways.size() << (ways.size() == 1 ? " way, " : " ways, ");
    if (measure && ways.size() > 1) {
      int64_t most_workspace = 0;
      for (const auto& way : ways) most_workspace = std::max(most_workspace, way.workspace);
      const Workspace workspace(most_workspace, device);  // may raise, and is then not remembered
      std::vector<std::function<void(cudaStream_t)>> candidates;
      for (const auto& way : ways) {
        candidates.push_back([&](cudaStream_t on) { way.run(pointers, workspace.get(), on); });
      }
      const std::vector<float> ms = time_each(candidates, stream);
      const float least = *std::min_element(ms.begin(), ms.end());
      if (least == std::numeric_limits<float>::infinity()) return refuse(entry, description, "every kernel failed");
      // The differences below kTie are noise: there the better guess counts.
      best = std::find_if(ms.begin(), ms.end(), [=](float t) { return t <= kTie * least; }) - ms.begin();
      story << ms[best] << " ms with ";
    }
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begin;
    story << ways[best].name << ", chosen in " << took.count() << " ms";
    entry.way = std::move(ways[best]);
    entry.error.clear();
    entry.story = story.str();
    entry.chosen = true;
    entry.measured = measure;
  }

  // Remembered, so that asking again costs nothing.
  static void refuse(Entry& entry, const std::string& description, const std::string& reason) {
    entry.error = entry.story = "sfast_native: " + description + ": " + reason;
    entry.chosen = entry.measured = true;
  }

  std::mutex mutex_;
  std::map<std::array<int64_t, kFields>, Entry> entries_;
};

}  // namespace sfast
