// The Hopper kernel's plans as ways of a plan cache, beside other libraries' ways. Without the kernel there are none.
#pragma once

#include "plan_cache.h"

#ifdef SFAST_HOPPER
#include "hopper_gemm.h"
#endif

namespace sfast {

// The plans' names serve as recipes: they say all.
constexpr const char* kHopperRecipe = "hopper ";

inline bool is_hopper_recipe(const std::string& recipe) {
  return recipe.rfind(kHopperRecipe, 0) == 0;
}

#ifdef SFAST_HOPPER
template <typename Pointers>
void propose_hopper(const HopperProblem& problem, int64_t device, const Ask& ask, std::vector<Way<Pointers>>* ways) {
  constexpr size_t kMost = 6, kAll = 1000;  // the estimate is trusted to have the best among that many
  const size_t most = ask.first_only ? 1 : ask.recipe.empty() ? kMost : kAll;
  for (const HopperPlan& plan : hopper_plans(problem, device, most)) {
    ways->push_back({plan.name(), 0, [=](const Pointers& at, void*, cudaStream_t stream) {
                       launch(problem, plan, {at.x, at.weight, at.bias, at.residual, at.out}, stream);
                     }});
  }
}
#endif

}  // namespace sfast
