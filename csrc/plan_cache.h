// One way to run each problem, chosen at its first call and kept: the key is the problem as a row of integers.
// A choice can be taken to another process as text: the problem, and a recipe that finds the same way again there.
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
  std::function<std::string()> recipe =
      nullptr;  // what another process finds it by, where its name does not say it all

  std::string found_by() const { return recipe ? recipe() : name; }
};

// Which ways are to be made: all, the best guess alone, or the one that is found by `recipe` (others may come with it).
struct Ask {
  bool first_only = false;
  std::string recipe;
};

// Of a problem's fields, the first is its device.
template <size_t kFields, typename Pointers>
class PlanCache {
 public:
  using Key = std::array<int64_t, kFields>;
  using Ways = std::vector<Way<Pointers>>;
  using Propose = std::function<Ways(const Ask&)>;

  explicit PlanCache(std::string op) : op_(std::move(op)) {}

  // Runs the fastest of the ways that `propose` makes, best guess first, or raises what choosing raised.
  // Measuring needs the operands' memory: `pointers.out` is overwritten, the rest is only read. While the stream is
  // being captured nothing can be measured: then the first guess serves, and the choice is made again later.
  void run(const Key& key, const std::string& description, int64_t device, cudaStream_t stream,
           const Pointers& pointers, const Propose& propose) {
    Entry& entry = find(key);
    const std::lock_guard<std::mutex> lock(entry.mutex);
    const bool may_measure = !is_capturing(stream);
    if (!entry.chosen && !entry.recalled.empty()) recall_choice(entry, description, device, stream, pointers, propose);
    if (!entry.chosen || (may_measure && !entry.measured))
      choose(entry, description, device, stream, pointers, propose);
    SFAST_CHECK(entry.error.empty(), entry.error);
    launch(entry, device, stream, pointers);
  }

  // The measured choices for one device, a line for each: `op field field ... = recipe`.
  std::string choices(int64_t device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::ostringstream text;
    for (auto& [key, entry] : entries_) {
      const std::lock_guard<std::mutex> entry_lock(entry.mutex);
      if (key[0] != device || !entry.measured || !entry.error.empty()) continue;
      text << op_;
      for (size_t i = 1; i < kFields; ++i) text << " " << key[i];
      text << " = " << entry.way.found_by() << "\n";
    }
    return text.str();
  }

  // Takes over, for one device, those of another process's choices that are this cache's; returns how many. They count
  // for problems not met yet, and only if the way can still be made.
  int64_t recall(int64_t device, const std::string& text) {
    std::istringstream lines(text);
    int64_t taken = 0;
    for (std::string line; std::getline(lines, line);) {
      const size_t equals = line.find(" = ");
      if (equals == std::string::npos) continue;
      std::istringstream words(line.substr(0, equals));
      std::string op;
      Key key{device};
      words >> op;
      for (size_t i = 1; i < kFields; ++i) words >> key[i];
      if (op != op_ || !words || words.rdbuf()->in_avail() > 0) continue;
      Entry& entry = find(key);
      const std::lock_guard<std::mutex> lock(entry.mutex);
      entry.recalled = line.substr(equals + 3);
      ++taken;
    }
    return taken;
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
    std::string recalled;  // another process's choice, until it is used
  };

  Entry& find(const Key& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return entries_[key];  // a map's nodes never move
  }

  static void launch(const Entry& entry, int64_t device, cudaStream_t stream, const Pointers& pointers) {
    const Workspace workspace(entry.way.workspace, device);
    entry.way.run(pointers, workspace.get(), stream);
  }

  // Makes the way that another process has chosen, and tries it; nothing is chosen where that fails.
  void recall_choice(Entry& entry, const std::string& description, int64_t device, cudaStream_t stream,
                     const Pointers& pointers, const Propose& propose) {
    const auto begin = std::chrono::steady_clock::now();
    const RelaxedCapture relaxed;
    const std::string recipe = std::exchange(entry.recalled, "");
    try {
      for (auto& way : propose(Ask{false, recipe})) {
        if (way.found_by() != recipe) continue;
        entry.way = std::move(way);
        if (!is_capturing(stream)) launch(entry, device, stream, pointers);  // what was captured cannot be taken back
        entry.chosen = entry.measured = true;
        entry.story = description + ": " + entry.way.name + ", known, made in " + milliseconds_since(begin);
        return;
      }
    } catch (const std::exception&) {
      cudaGetLastError();  // its error must not surface in a later call
    }
  }

  static std::string milliseconds_since(std::chrono::steady_clock::time_point begin) {
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begin;
    std::ostringstream text;
    text << took.count() << " ms";
    return text.str();
  }

  void choose(Entry& entry, const std::string& description, int64_t device, cudaStream_t stream,
              const Pointers& pointers, const Propose& propose) {
    constexpr float kTie = 1.02f;
    const auto begin = std::chrono::steady_clock::now();
    const RelaxedCapture relaxed;
    const bool measure = !is_capturing(stream);
    std::ostringstream story;
    Ways ways;
    size_t best = 0;
    try {
      ways = propose(Ask{!measure, ""});
      SFAST_CHECK(!ways.empty(), "no kernel");
    } catch (const std::exception& error) {
      return refuse(entry, description, error.what());
    }
    story << description << ": " << ways.size() << (ways.size() == 1 ? " way" : " ways") << " made in "
          << milliseconds_since(begin) << ", ";
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
    story << ways[best].name << ", chosen in " << milliseconds_since(begin);
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

  const std::string op_;
  std::mutex mutex_;
  std::map<Key, Entry> entries_;
};

}  // namespace sfast
