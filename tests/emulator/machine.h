// Thread blocks of a GPU, run by fibers: a fiber per CUDA thread, warps that meet for collective instructions, barriers
// that check who is missing, shared and global memory that remember who touched what.
//
// A fiber runs until it waits (barrier, warp collective) or ends; then another runnable one is picked by the seed, now and then
// of another block: a few blocks of a launch are in flight at a time. So a missing barrier is no matter of luck with timing: the
// reader finds NaN, and the shadow of the memory reports the race.
// Adding an asynchronous engine (mbarrier, TMA, wgmma) means: a queue of operations beside `Thread::copies`, landed by its
// own wait, and a predicate for wait_until().
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <source_location>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "fiber.h"

namespace emulator {

using Where = std::source_location;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// A cp.async that was issued and has not landed.
struct Copy {
  uint32_t target, bytes;
  const void* source;  // nullptr: zero fill
  Where where;
};

struct Thread {
  Fiber fiber;
  Index index;
  unsigned number = 0;  // within the block
  unsigned lane = 0, warp = 0;
  bool finished = false;
  const char* waits_for = nullptr;  // nullptr: runnable
  Where where;
  std::vector<Copy> open_group;  // issued, not committed
  uint32_t reductions = 0;
  std::map<std::pair<const char*, unsigned>, uint32_t> accesses;  // of shared memory, by source line, while banks are counted
  std::vector<std::vector<Copy>> copies;  // committed groups, oldest first
};

// Lanes meet here for one warp-wide instruction; the last to come executes it for all.
struct Rendezvous {
  uint32_t mask = 0, arrived = 0;
  const char* instruction = nullptr;
  void* arguments[32] = {};
};

struct Barrier {
  unsigned expected = 0;
  std::vector<unsigned> waiting;
  Where where;
};

// What the accesses of one word of memory by the threads of a block were, to find two that no barrier orders.
struct Word {
  uint32_t write_epoch = 0, write_warp_epoch = 0, read_epoch = 0, read_warp_epoch = 0;
  uint16_t writer = 0, reader = 0;  // thread number, or one of the values below
  uint16_t copies_in_flight = 0;
};
constexpr uint16_t kSeveralInWarp = 0x8000;  // + warp
constexpr uint16_t kSeveralWarps = 0xffff, kNobody = 0xfffe;

struct Launch {
  std::string kernel;
  Index grid, block;
  uint32_t shared_bytes = 0;
  std::function<void()> body;
};

class Block {
 public:
  // `slot`: which of kBlocksInFlight, for the stacks of its threads; `number`: within the grid.
  Block(const Launch& launch, uint64_t number, uint64_t seed, unsigned slot);
  // Lets one thread run until it waits. Throws std::runtime_error with the report of what went wrong.
  void step();
  bool finished() const { return alive_ == 0; }
  unsigned slot() const { return slot_; }
  uint64_t number() const { return number_; }

  Thread& thread() { return *current_; }
  const Launch& launch() const { return launch_; }
  bool idle() const { return !wrote_ && !copied_; }
  Index index() const { return index_; }

  void barrier(unsigned id, unsigned threads, Where where);
  bool barrier_or(unsigned threads, bool predicate, Where where);  // whether any thread's predicate holds
  void warp_sync(uint32_t mask, Where where);
  // Every lane of `mask` brings its arguments; `execute` sees those of all lanes (nullptr outside of the mask).
  void collective(const char* instruction, uint32_t mask, void* arguments, void (*execute)(void**), Where where);

  void read_shared(uint32_t address, void* target, uint32_t bytes, Where where);
  void write_shared(uint32_t address, const void* source, uint32_t bytes, Where where);
  void issue_copy(uint32_t target, const void* source, uint32_t bytes, Where where);
  void commit_copies();
  void wait_copies(unsigned groups_left_in_flight);
  void note_reduction(const void* address);
  void note_written() { wrote_ = true; }
  uint16_t read_word(Word& word);
  uint16_t write_word(Word& word, bool whole, bool* after_read);
  bool has_clocks() const { return !clocks_.empty(); }

  // Stops the block: the report names kernel, block, thread and source line.
  [[noreturn]] void fail(const std::string& what, Where where);

  static constexpr uint32_t kSharedBase = 1024;  // address 0 is no valid one, and 1024-byte alignment can be relied on

 private:
  static void enter(void* thread);
  void check_landed(const Thread& thread);
  void wait(const char* reason, Where where);
  void wake(unsigned number);
  unsigned pick();
  void report_stuck();
  uint8_t* shared(uint32_t address, uint32_t bytes, const char* access, Where where);
  void note_read(uint32_t address, uint32_t bytes, Where where);
  void note_write(uint32_t address, uint32_t bytes, Where where);
  void begin_clocks();
  void join_clocks(const std::vector<unsigned>& threads);
  uint32_t now() const { return clocks_.empty() ? epoch_ : clocks_[current_->number][current_->number]; }
  void note_banks(uint32_t address, uint32_t bytes, Where where);
  void sum_banks();
  bool unordered(uint16_t who, uint32_t epoch, uint32_t warp_epoch) const;
  [[noreturn]] void report_race(const char* kind, uint16_t other, uint32_t address, Where where);

  const Launch& launch_;
  uint64_t number_;
  unsigned slot_;
  Index index_;
  std::vector<Thread> threads_;
  std::vector<unsigned> runnable_;
  std::vector<Rendezvous> rendezvous_;  // per warp
  std::vector<Barrier> barriers_;
  std::vector<uint8_t> shared_;
  std::vector<Word> words_;
  std::vector<uint32_t> warp_epochs_;
  uint32_t epoch_ = 1;
  bool votes_[2] = {};  // of the barriers of the whole block with odd and even epochs
  // From the first barrier on that is not the whole block's, epochs do not order all accesses: then every thread has an epoch of its
  // own, which its barriers advance, and knows those of the others that it is ordered after (vector clocks).
  std::vector<std::vector<uint32_t>> clocks_;
  std::unordered_map<uint32_t, std::map<uint16_t, uint32_t>> readers_;  // with clocks: of a word, since its last write
  Thread* current_ = nullptr;
  Fiber scheduler_;
  uint64_t random_;
  int policy_;
  unsigned alive_ = 0;
  bool wrote_ = false, copied_ = false;
  std::vector<std::map<uint32_t, std::set<uint64_t>>> reductions_;  // of a warp: sectors of its n-th instruction
  // Of a warp: lanes and addresses of the n-th access of a source line.
  struct SharedAccess {
    uint32_t bytes = 0;
    std::vector<std::pair<unsigned, uint32_t>> lanes;
  };
  std::vector<std::map<std::tuple<const char*, unsigned, uint32_t>, SharedAccess>> shared_accesses_;
  std::string error_;
};

constexpr unsigned kBlocksInFlight = 3;

// The block that runs on this thread of the host.
Block& active_block();
Block* active_block_or_null();

// Runs all blocks of a launch, begun and interleaved in an order that depends on the seed.
void run(const Launch& launch);
void set_seed(uint64_t seed);

// ---- global memory: nothing but what was registered may be touched through the access wrappers ----
void register_memory(const std::string& name, const void* data, uint64_t bytes, bool writable);
void forget_memory();
enum class Access { kRead, kWrite, kAdd };
void check_global(const void* address, uint64_t bytes, Access access, Where where);

// Bytes of one registered memory. `asked`: what threads asked for. The others count 32-byte sectors once for each launch: what
// comes from memory and goes there when a launch finds nothing in the caches and loses nothing of what it has read.
struct Traffic {
  uint64_t asked = 0, read = 0, written = 0;
};
std::map<std::string, Traffic> take_traffic();

// Blocks of a kernel, and how many of them neither started a copy nor wrote anything.
struct Blocks {
  uint64_t launched = 0, idle = 0;
};
std::map<std::string, Blocks> take_blocks();

// ---- statistics of the launches since the last call, for the predicted costs of a kernel ----
struct Counts {
  uint64_t mma = 0, ldmatrix = 0, cp_async = 0, barriers = 0;
  uint64_t shared_accesses = 0, collectives = 0;  // of threads; of warps: shuffles, votes, __syncwarp
  uint64_t reductions = 0, reduction_sectors = 0;  // of threads; 32-byte sectors that the instructions of warps touch
  // Of shared memory, while count_banks is on: a warp's access takes one wavefront for 128 bytes, more where lanes meet in a bank.
  uint64_t wavefronts = 0, bank_conflicts = 0;  // all; those beyond the least number
};
Counts& counts();
void count_banks(bool on);

}  // namespace emulator
