// What forward, backward and decode share about a problem: one sequence's rows, keys and prefix, and the work queue.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../zero_gate_params.h"
#include "cpu_kernels.h"
#include "storage.h"

namespace lak::cpu::LAK_ISA {

LAK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LAK_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
LAK_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// One sequence of the batch. Padded and packed problems differ only here.
struct Sequence {
  int64_t first_query, queries;  // rows in the query tensor
  int64_t first_key;             // row of key 0 in the key tensor
  int64_t keys;                  // rows that exist
  int64_t key_begin, key_end;    // the window of valid keys
  int64_t diagonal;              // query i sees key j when j <= i + diagonal
  int64_t prefix;                // entry of the prefix table, -1: none
};

LAK_INLINE Sequence sequence_of(const ZeroGateParams& params, int64_t b) {
  Sequence sequence;
  sequence.first_query = params.cu_seqlens_q ? params.cu_seqlens_q[b] : 0;
  sequence.queries = params.cu_seqlens_q ? params.cu_seqlens_q[b + 1] - sequence.first_query : params.seq_q;
  sequence.first_key = params.cu_seqlens_k ? params.cu_seqlens_k[b] : 0;
  sequence.keys = params.cu_seqlens_k ? params.cu_seqlens_k[b + 1] - sequence.first_key : params.seq_k;
  sequence.key_begin = params.key_start ? larger(0, params.key_start[b]) : 0;
  sequence.key_end = params.key_end ? smaller(params.key_end[b], sequence.keys) : sequence.keys;
  sequence.diagonal = params.is_causal ? sequence.key_end - sequence.queries : sequence.keys;
  sequence.prefix = -1;
  if (params.prefix_length > 0 && params.prefix_count > 0) {
    sequence.prefix = params.prefix_index ? params.prefix_index[b] : params.prefix_count == 1 ? 0 : b;
  }
  return sequence;
}

// Keys [key_begin, visible_end) are seen by at least one of the queries up to last_query.
LAK_INLINE int64_t visible_end(const Sequence& sequence, int64_t last_query) {
  return smaller(sequence.key_end, last_query + sequence.diagonal + 1);
}

template <class T>
LAK_INLINE T* row_pointer(const TensorView& v, int64_t b, int64_t h, int64_t row) {
  return static_cast<T*>(v.data) + b * v.stride_batch + h * v.stride_head + row * v.stride_row;
}
template <class C>
LAK_INLINE C* row_statistic(const RowView& v, int64_t b, int64_t h, int64_t row) {
  return static_cast<C*>(v.data) + b * v.stride_batch + h * v.stride_head + row;
}
template <class C>
LAK_INLINE C gate_of(const ZeroGateParams& params, int64_t prefix, int64_t h) {
  return static_cast<const C*>(params.gate)[prefix * params.gate_stride_prefix + h * params.gate_stride_head];
}

// Tasks are taken one by one from a shared counter, so that threads finish together however uneven causal blocks are.
// Every task writes its own rows, so results do not depend on who runs it. `worker` selects the scratch memory.
template <class Work>
void run_tasks(const Parallel& parallel, int64_t tasks, const Work& work) {
  struct Context {
    const Work* work;
    int64_t tasks;
    int64_t next;
  } context{&work, tasks, 0};
  const auto body = +[](void* opaque, int64_t begin, int64_t end) {
    auto* c = static_cast<Context*>(opaque);
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task; (task = __atomic_fetch_add(&c->next, 1, __ATOMIC_RELAXED)) < c->tasks;) (*c->work)(task, worker);
    }
  };
  parallel.run(smaller(parallel.threads, tasks), body, &context);
}

// Hands out aligned pieces of a scratch buffer; with a null base it only counts.
class Scratch {
 public:
  explicit Scratch(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}
  template <class C>
  C* take(int64_t count) {
    C* piece = reinterpret_cast<C*>(base_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(C)), 64);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  uintptr_t base_;
  int64_t used_ = 0;
};

}  // namespace lak::cpu::LAK_ISA
