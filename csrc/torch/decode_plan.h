// The decode plan: a decoder's weights and cache bound once, one token of each sequence a call.
// Torch-free, for the Python module; decode_plan.cpp takes PyTorch's threads.
#pragma once
#include <atomic>
#include <memory>
#include <vector>

#include "ops/decode_plan.h"
#include "ops/decode_attention.h"

namespace fastlm {

// What does not change from token to token. `weights` and the pointers in it belong to the caller,
// who keeps the tensors alive.
struct PlanModel {
  PlanStep step;  // its sizes, embeddings, tables and constants
  std::vector<PlanLayer> layers;
  PlanNorm norm;
  PlanProduct head;
  int64_t places = 0;  // positions that the tables know
  int64_t window = 0;  // 0 for all keys
  float scale = 1.0f;  // of the attention's scores
};

// What a step is given, [batch] each. Padding on the left of a sequence makes its tokens' positions
// smaller than their places in the cache and hides its first keys.
struct PlanTokens {
  const int64_t* tokens;
  const int64_t* positions;
  const int64_t* slots;  // in the cache
  const int64_t* first;  // keys that are seen begin here; null for the cache's beginning
};

// Memory aligned to cache lines, not initialised.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes);
  template <class T>
  T* as() const {
    return static_cast<T*>(static_cast<void*>(data_.get()));
  }

 private:
  struct Free {
    void operator()(char* p) const;
  };
  std::unique_ptr<char, Free> data_;
};

// One stage's work in a token, shared by all threads that take part.
struct alignas(64) Progress {
  std::atomic<int64_t> next;  // the next piece to be taken
  std::atomic<int64_t> done;  // items finished
};

class DecodePlan {
 public:
  explicit DecodePlan(PlanModel model);

  // keys and values: one pointer a layer, [batch, kv_heads, capacity, head_dim] each.
  void bind_cache(const std::vector<void*>& keys, const std::vector<void*>& values,
                  int64_t capacity);

  // Takes a token of each sequence through all layers and appends it to the cache. Writes logits
  // [batch, vocab] and, unless best is null, the largest logit's place among the first `limit` to
  // best [batch]. Throws std::out_of_range for a token or place that is not there and, where the
  // largest logit is asked for, std::runtime_error for logits that are not finite.
  void step(const PlanTokens& given, float* logits, int64_t limit, int64_t* best);
  int64_t batch() const { return model_.step.batch; }
  bool one_sequence() const { return model_.step.one_sequence; }

 private:
  struct Head {  // of the last stage
    float* logits;
    int64_t limit;
  };
  void cut_attention(const int64_t* first);
  const void* operand(const PlanProduct& p, const void* rows, int64_t participant) const;
  void run(int64_t participant, int64_t threads, const Head& head);

  PlanModel model_;
  int64_t row_bytes_, quantized_bytes_ = 0, useful_threads_;
  Buffer x_, q_, attended_, hidden_, partial_;
  int64_t partial_floats_ = 0;
  std::vector<Buffer> rows_, quantized_;  // normalised and quantized, a copy per participant
  std::vector<Progress> progress_;
  std::vector<int64_t> lengths_, first_key_, first_task_;
  std::vector<float> largest_;  // of each piece of the last stage
  std::vector<int64_t> at_;
  DecodeAttentionArgs attention_{};
  bool joined_ = false;  // whether a sequence's keys are cut
};

}  // namespace fastlm
