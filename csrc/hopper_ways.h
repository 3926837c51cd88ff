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
HopperPointers five_pointers(const Pointers& at) {
  HopperPointers made;
  made.x = at.x, made.weight = at.weight, made.bias = at.bias, made.residual = at.residual, made.out = at.out;
  return made;
}

template <typename Pointers>
void propose_hopper(const HopperProblem& problem, int64_t device, const Ask& ask, std::vector<Way<Pointers>>* ways,
                    HopperPointers (*pointers)(const Pointers&) = &five_pointers<Pointers>) {
  constexpr size_t kMost = 8;        // the estimate is trusted to have the best among that many,
  constexpr double kHopeless = 1.5;  // and to be right about one that is so many times slower
  double best = 0;
  size_t proposed = 0;
  for (const HopperPlan& plan : hopper_plans(problem, device)) {
    if (proposed == 0) best = plan.cost;
    if (ask.recipe.empty()) {
      if (proposed == (ask.first_only ? 1 : kMost) || plan.cost > kHopeless * best) break;
    } else if (ask.recipe != plan.name()) {
      continue;
    }
    ++proposed;
    prepare(problem, plan);
    ways->push_back({plan.name(), 0, [=](const Pointers& at, void*, cudaStream_t stream) {
                       launch(problem, plan, pointers(at), stream);
                     }});
  }
}
#endif

}  // namespace sfast
