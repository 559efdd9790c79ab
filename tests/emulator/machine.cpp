#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace emulator {
namespace {

thread_local Block* active = nullptr;
uint64_t current_seed = 0;
Counts current_counts;
bool counting_banks = false;
constexpr uint64_t kSectorBytes = 32, kMostCounted = uint64_t{1} << 32;

// forward_kernel of "... kKernel = lak::sm80::forward_kernel<...>; ..."
std::string short_name(const std::string& kernel) {
  const size_t at = kernel.find("kKernel = ");
  if (at == std::string::npos) return kernel;
  const std::string name = kernel.substr(at + 10, kernel.find_first_of("<;]", at) - at - 10);
  return name.substr(name.rfind(':') + 1);
}

// Stacks of up to 1024 fibers for each block in flight, mapped once: pages that no fiber touches cost nothing.
uint8_t* stack_of(unsigned number) {
  static uint8_t* stacks = [] {
    void* memory = mmap(nullptr, kBlocksInFlight * 1024 * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulator: no memory for the stacks of the threads");
    return static_cast<uint8_t*>(memory);
  }();
  return stacks + number * kStackBytes;
}

std::string place(const Where& where) {
  std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

std::string name_of(uint16_t who) {
  return who == kSeveralWarps          ? "threads of several warps"
         : (who & kSeveralInWarp) != 0 ? "threads of warp " + std::to_string(who & ~kSeveralInWarp)
                                       : "thread " + std::to_string(who);
}

Index index_of(uint64_t number, Index size) {
  return {static_cast<unsigned>(number % size.x), static_cast<unsigned>(number / size.x % size.y),
          static_cast<unsigned>(number / size.x / size.y)};
}

std::string text(Index i) { return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")"; }

// Which blocks of the launch that runs accessed two bytes of global memory: number + 1, or one of the values below. Of a single
// block also which threads.
struct Touch {
  uint32_t writer = 0, reader = 0;
  Word word;
};
constexpr uint32_t kSeveralBlocks = 0xffffffff, kAdders = 0xfffffffe;

struct Range {
  std::string name;
  uint64_t begin, end;
  bool writable;
  std::vector<bool> read, written;  // sectors of the launch that runs
  std::vector<Touch> touches;       // of two bytes each
  uint64_t asked = 0;
};
std::vector<Range> ranges;
std::map<std::string, Traffic> traffic;
std::map<std::string, Blocks> block_counts;

void count_sectors() {
  for (Range& range : ranges) {
    Traffic& total = traffic[range.name];
    total.asked += std::exchange(range.asked, 0);
    total.read += kSectorBytes * std::count(range.read.begin(), range.read.end(), true);
    total.written += kSectorBytes * std::count(range.written.begin(), range.written.end(), true);
    range.read.assign(range.read.size(), false);
    range.written.assign(range.written.size(), false);
    range.touches.assign(range.touches.size(), {});
  }
}

}  // namespace

Block& active_block() {
  if (active == nullptr) throw std::runtime_error("emulator: device code was called outside of a launch");
  return *active;
}
Block* active_block_or_null() { return active; }
Counts& counts() { return current_counts; }
void count_banks(bool on) { counting_banks = on; }
void set_seed(uint64_t seed) { current_seed = seed; }

Block::Block(const Launch& launch, uint64_t number, uint64_t seed, unsigned slot)
    : launch_(launch), number_(number), slot_(slot), index_(index_of(number, launch.grid)),
      random_(seed * 0x9e3779b97f4a7c15ULL + 0x632be59bd9b4e019ULL), policy_(seed % 3) {
  const unsigned count = launch.block.x * launch.block.y * launch.block.z;
  threads_.resize(count);
  rendezvous_.resize((count + 31) / 32);
  warp_epochs_.assign((count + 31) / 32, 1);
  barriers_.resize(16);
  reductions_.resize((count + 31) / 32);
  shared_accesses_.resize((count + 31) / 32);
  shared_.assign(launch.shared_bytes, 0xff);  // NaN in every floating-point type
  words_.resize((launch.shared_bytes + 3) / 4);
  alive_ = count;
  for (unsigned n = 0; n < count; ++n) {
    Thread& t = threads_[n];
    t.number = n;
    t.lane = n % 32;
    t.warp = n / 32;
    t.index = index_of(n, launch.block);
    make_fiber(t.fiber, stack_of(slot * 1024 + n), &Block::enter, &t);
    runnable_.push_back(n);
  }
}

void Block::enter(void* argument) {
  Block& block = *active;
  Thread& thread = *static_cast<Thread*>(argument);
  block.launch_.body();
  block.check_landed(thread);
  thread.finished = true;
  if (--block.alive_ == 0) block.sum_banks();
  switch_fiber(thread.fiber, block.scheduler_);
}

// A copy that lands after its block has ended writes into shared memory that may be another block's by then.
void Block::check_landed(const Thread& thread) {
  if (!thread.open_group.empty()) fail("the thread ends with a cp.async in flight", thread.open_group.front().where);
  for (const auto& group : thread.copies) {
    if (!group.empty()) fail("the thread ends with a cp.async in flight", group.front().where);
  }
}

unsigned Block::pick() {
  random_ ^= random_ << 13;
  random_ ^= random_ >> 7;
  random_ ^= random_ << 17;
  // Three tempers: any fiber; the one that was woken last (a warp runs far ahead of the others); the one that has
  // waited longest (all go in step). Now and then each does something else.
  size_t position = random_ % runnable_.size();
  if (policy_ != 0 && (random_ >> 32) % 16 != 0) position = policy_ == 1 ? runnable_.size() - 1 : 0;
  const unsigned number = runnable_[position];
  if (policy_ == 2 && position == 0) {
    runnable_.erase(runnable_.begin());
  } else {
    runnable_[position] = runnable_.back();
    runnable_.pop_back();
  }
  return number;
}

void Block::step() {
  active = this;
  if (runnable_.empty()) {
    report_stuck();
  } else {
    current_ = &threads_[pick()];
    switch_fiber(scheduler_, current_->fiber);
  }
  active = nullptr;
  // Fibers that still wait are dropped with their stacks: device code owns nothing.
  if (!error_.empty()) throw std::runtime_error(error_);
}

void Block::fail(const std::string& what, Where where) {
  std::ostringstream report;
  report << what << "\n  at " << place(where) << " by thread " << text(current_->index) << " (warp " << current_->warp
         << ", lane " << current_->lane << ") of block " << text(index_) << "\n  kernel " << launch_.kernel;
  if (error_.empty()) error_ = report.str();
  switch_fiber(current_->fiber, scheduler_);
  __builtin_unreachable();
}

void Block::report_stuck() {
  // Who waits where, as "threads 0-31 wait at kernel.cu:12 for __syncthreads".
  std::map<std::string, std::vector<unsigned>> groups;
  bool barrier = false;
  for (const Thread& t : threads_) {
    barrier = barrier || (!t.finished && std::string(t.waits_for) == "barrier");
    groups[t.finished ? "have finished" : "wait at " + place(t.where) + " for " + t.waits_for].push_back(t.number);
  }
  std::ostringstream report;
  report << (barrier ? "divergent barrier: not every thread reaches it" : "deadlock: every thread waits");
  for (const auto& [state, numbers] : groups) {
    report << "\n  threads ";
    for (size_t i = 0; i < numbers.size();) {
      size_t j = i;
      while (j + 1 < numbers.size() && numbers[j + 1] == numbers[j] + 1) ++j;
      report << (i ? ", " : "") << numbers[i];
      if (j > i) report << "-" << numbers[j];
      i = j + 1;
    }
    report << " " << state;
  }
  report << "\n  in block " << text(index_) << "\n  kernel " << launch_.kernel;
  error_ = report.str();
}

void Block::wait(const char* reason, Where where) {
  current_->waits_for = reason;
  current_->where = where;
  switch_fiber(current_->fiber, scheduler_);
}

void Block::wake(unsigned number) {
  threads_[number].waits_for = nullptr;
  runnable_.push_back(number);
}

void Block::barrier(unsigned id, unsigned count, Where where) {
  if (id >= barriers_.size()) fail("barrier id out of range: " + std::to_string(id), where);
  if (count % 32 != 0 && count != threads_.size()) fail("barrier for a number of threads that is no multiple of 32", where);
  Barrier& barrier = barriers_[id];
  if (barrier.waiting.empty()) {
    barrier.expected = count;
    barrier.where = where;
  } else if (barrier.expected != count) {
    fail("barrier " + std::to_string(id) + ": threads disagree about how many take part", where);
  } else if (barrier.where.line() != where.line() || std::strcmp(barrier.where.file_name(), where.file_name()) != 0) {
    fail("divergent barrier: some threads wait at " + place(barrier.where) + ", this one came to another", where);
  }
  barrier.waiting.push_back(current_->number);
  if (barrier.waiting.size() < count) {
    wait("barrier", where);
    return;
  }
  ++current_counts.barriers;
  std::vector<unsigned> waiting;
  waiting.swap(barrier.waiting);
  if (count != threads_.size() && clocks_.empty()) begin_clocks();
  if (!clocks_.empty()) join_clocks(waiting);
  if (count == threads_.size()) votes_[++epoch_ % 2] = false;  // those of the epoch before were read ahead of this barrier
  for (unsigned number : waiting) {
    if (number != current_->number) wake(number);
  }
  // The last to arrive has no right to go on first.
  runnable_.push_back(current_->number);
  switch_fiber(current_->fiber, scheduler_);
}

bool Block::barrier_or(unsigned count, bool predicate, Where where) {
  bool& vote = votes_[epoch_ % 2];
  vote = vote || predicate;
  barrier(0, count, where);
  return vote;
}

void Block::collective(const char* instruction, uint32_t mask, void* arguments, void (*execute)(void**), Where where) {
  Thread& me = *current_;
  Rendezvous& meeting = rendezvous_[me.warp];
  if ((mask >> me.lane & 1) == 0) fail(std::string(instruction) + ": the calling lane is not in the mask", where);
  if (meeting.arrived == 0) {
    meeting.mask = mask;
    meeting.instruction = instruction;
  } else if (meeting.mask != mask || std::strcmp(meeting.instruction, instruction) != 0) {
    fail(std::string("divergent warp: some lanes wait in ") + meeting.instruction + ", this one came to " + instruction, where);
  }
  meeting.arguments[me.lane] = arguments;
  meeting.arrived |= 1u << me.lane;
  if (meeting.arrived != mask) {
    wait(instruction, where);
    return;
  }
  ++current_counts.collectives;
  execute(meeting.arguments);
  meeting.arrived = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    meeting.arguments[lane] = nullptr;
    if ((mask >> lane & 1) != 0 && lane != me.lane) wake(me.warp * 32 + lane);
  }
}

void Block::warp_sync(uint32_t mask, Where where) {
  collective("__syncwarp", mask, current_, [](void** lanes) {
    Block& block = *active;
    ++block.warp_epochs_[block.current_->warp];
    if (block.clocks_.empty()) return;
    std::vector<unsigned> threads;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (lanes[lane] != nullptr) threads.push_back(static_cast<Thread*>(lanes[lane])->number);
    }
    block.join_clocks(threads);
  }, where);
}

// Until now every thread is ordered after the others' accesses of all epochs but this one.
void Block::begin_clocks() {
  clocks_.assign(threads_.size(), std::vector<uint32_t>(threads_.size(), epoch_ - 1));
  for (size_t n = 0; n < threads_.size(); ++n) clocks_[n][n] = epoch_;
}

void Block::join_clocks(const std::vector<unsigned>& threads) {
  std::vector<uint32_t> joined(threads_.size(), 0);
  for (unsigned thread : threads) {
    for (size_t n = 0; n < joined.size(); ++n) joined[n] = std::max(joined[n], clocks_[thread][n]);
  }
  for (unsigned thread : threads) {
    clocks_[thread] = joined;
    ++clocks_[thread][thread];
  }
}

uint8_t* Block::shared(uint32_t address, uint32_t bytes, const char* access, Where where) {
  if (address < kSharedBase || static_cast<uint64_t>(address) + bytes > static_cast<uint64_t>(kSharedBase) + shared_.size()) {
    fail(std::string("out of bounds: ") + access + " of " + std::to_string(bytes) + " bytes at offset " +
             std::to_string(static_cast<int64_t>(address) - kSharedBase) + " of " + std::to_string(shared_.size()) +
             " bytes of shared memory",
         where);
  }
  if (address % bytes != 0) fail(std::string("misaligned ") + access + " of shared memory", where);
  return shared_.data() + (address - kSharedBase);
}

// True when an earlier access by `who` may happen at the same time as one by the current thread.
bool Block::unordered(uint16_t who, uint32_t epoch, uint32_t warp_epoch) const {
  const bool several = who == kSeveralWarps || (who & kSeveralInWarp) != 0;
  const unsigned warp = several ? who & ~kSeveralInWarp : who / 32;
  if (!clocks_.empty()) {
    for (const Thread& other : threads_) {
      const bool meant = who == kSeveralWarps || (several ? other.warp == warp : other.number == who);
      const bool synchronised = other.warp == current_->warp && warp_epoch != warp_epochs_[other.warp];
      if (meant && other.number != current_->number && !synchronised && epoch > clocks_[current_->number][other.number])
        return true;
    }
    return false;
  }
  if (epoch != epoch_) return false;
  if (who == kSeveralWarps) return true;
  if (warp != current_->warp) return true;
  return (several || who != current_->number) && warp_epoch == warp_epochs_[warp];
}

void Block::report_race(const char* kind, uint16_t other, uint32_t address, Where where) {
  fail(std::string("race in shared memory: ") + kind + " at offset " + std::to_string(address - kSharedBase) +
           ", no barrier since the access by " + name_of(other),
       where);
}

// Both return who accessed the word without a barrier in between, or kNobody, and note that the current thread has.
uint16_t Block::read_word(Word& word) {
  const uint32_t warp_epoch = warp_epochs_[current_->warp];
  const uint16_t other = unordered(word.writer, word.write_epoch, word.write_warp_epoch) ? word.writer : kNobody;
  uint16_t reader = current_->number;
  if (word.read_epoch == epoch_ && word.reader != reader) {
    const bool several = (word.reader & kSeveralInWarp) != 0;
    const unsigned warp = several ? word.reader & ~kSeveralInWarp : word.reader / 32;
    if (word.reader == kSeveralWarps || warp != current_->warp) {
      reader = kSeveralWarps;
    } else if (word.read_warp_epoch == warp_epoch) {
      reader = kSeveralInWarp | current_->warp;
    }
  }
  word.reader = reader;
  word.read_epoch = epoch_;
  word.read_warp_epoch = warp_epoch;
  return other;
}

uint16_t Block::write_word(Word& word, bool whole, bool* after_read) {
  uint16_t other = kNobody;
  *after_read = unordered(word.reader, word.read_epoch, word.read_warp_epoch);
  if (*after_read) other = word.reader;
  if (whole && unordered(word.writer, word.write_epoch, word.write_warp_epoch)) other = word.writer, *after_read = false;
  word.writer = current_->number;
  word.write_epoch = now();
  word.write_warp_epoch = warp_epochs_[current_->warp];
  return other;
}

void Block::note_read(uint32_t address, uint32_t bytes, Where where) {
  for (uint32_t a = address / 4 * 4; a < address + bytes; a += 4) {
    Word& word = words_[(a - kSharedBase) / 4];
    if (word.copies_in_flight != 0) fail("read of shared memory before the wait for its cp.async", where);
    const uint16_t other = read_word(word);
    if (other != kNobody) report_race("read after write", other, a, where);
    if (!clocks_.empty()) {
      readers_[(a - kSharedBase) / 4][current_->number] = now();
      word.read_epoch = 0;  // the clocks know
    }
  }
}

void Block::note_write(uint32_t address, uint32_t bytes, Where where) {
  for (uint32_t a = address / 4 * 4; a < address + bytes; a += 4) {
    Word& word = words_[(a - kSharedBase) / 4];
    if (word.copies_in_flight != 0) fail("write to shared memory while a cp.async to it is in flight", where);
    bool after_read;
    const uint16_t other = write_word(word, bytes >= 4, &after_read);
    if (other != kNobody) report_race(after_read ? "write after read" : "write after write", other, a, where);
    if (clocks_.empty()) continue;
    for (const auto& [reader, epoch] : readers_[(a - kSharedBase) / 4]) {
      if (reader != current_->number && epoch > clocks_[current_->number][reader]) {
        report_race("write after read", reader, a, where);
      }
    }
    readers_.erase((a - kSharedBase) / 4);
  }
}

void Block::read_shared(uint32_t address, void* target, uint32_t bytes, Where where) {
  ++current_counts.shared_accesses;
  const uint8_t* data = shared(address, bytes, "read", where);
  note_read(address, bytes, where);
  note_banks(address, bytes, where);
  std::memcpy(target, data, bytes);
}

void Block::write_shared(uint32_t address, const void* source, uint32_t bytes, Where where) {
  ++current_counts.shared_accesses;
  uint8_t* data = shared(address, bytes, "write", where);
  note_write(address, bytes, where);
  note_banks(address, bytes, where);
  std::memcpy(data, source, bytes);
}

void Block::issue_copy(uint32_t target, const void* source, uint32_t bytes, Where where) {
  shared(target, bytes, "cp.async", where);
  copied_ = true;
  if (source != nullptr) check_global(source, bytes, Access::kRead, where);
  // It may land at any time from now on: whoever still reads there races with it.
  note_write(target, bytes, where);
  note_banks(target, bytes, where);
  for (uint32_t a = target; a < target + bytes; a += 4) ++words_[(a - kSharedBase) / 4].copies_in_flight;
  current_->open_group.push_back({target, bytes, source, where});
  ++current_counts.cp_async;
}

void Block::commit_copies() {
  current_->copies.push_back(std::move(current_->open_group));
  current_->open_group.clear();
}

void Block::wait_copies(unsigned left) {
  auto& groups = current_->copies;
  const size_t land = groups.size() > left ? groups.size() - left : 0;
  for (size_t g = 0; g < land; ++g) {
    for (const Copy& copy : groups[g]) {
      for (uint32_t a = copy.target; a < copy.target + copy.bytes; a += 4) --words_[(a - kSharedBase) / 4].copies_in_flight;
      note_write(copy.target, copy.bytes, copy.where);
      uint8_t* data = shared(copy.target, copy.bytes, "cp.async", copy.where);
      if (copy.source != nullptr) {
        std::memcpy(data, copy.source, copy.bytes);
      } else {
        std::memset(data, 0, copy.bytes);
      }
    }
  }
  groups.erase(groups.begin(), groups.begin() + land);
}

// The lanes of a warp run by themselves, but their n-th accesses from one source line are one instruction.
void Block::note_banks(uint32_t address, uint32_t bytes, Where where) {
  if (!counting_banks) return;
  const uint32_t number = current_->accesses[{where.file_name(), where.line()}]++;
  SharedAccess& access = shared_accesses_[current_->warp][{where.file_name(), where.line(), number}];
  access.bytes = bytes;
  access.lanes.emplace_back(current_->lane, address);
}

// 128 bytes at a time: the lanes of a quarter of the warp for 16 bytes each, of a half for 8, all of them for less.
void Block::sum_banks() {
  for (const auto& accesses : shared_accesses_) {
    for (const auto& [where, access] : accesses) {
      const unsigned lanes_at_a_time = access.bytes >= 16 ? 8 : access.bytes == 8 ? 16 : 32;
      std::map<unsigned, std::map<unsigned, std::set<uint32_t>>> phases;  // words by bank, of which lanes may share one
      for (const auto& [lane, address] : access.lanes) {
        for (uint32_t word = address / 4; word < (address + access.bytes + 3) / 4; ++word) {
          phases[lane / lanes_at_a_time][word % 32].insert(word);
        }
      }
      for (const auto& [phase, banks] : phases) {
        size_t most = 0;
        for (const auto& [bank, words] : banks) most = std::max(most, words.size());
        current_counts.wavefronts += most;
        current_counts.bank_conflicts += most - 1;
      }
    }
  }
}

// The lanes of a warp run by themselves, but their n-th additions are one instruction.
void Block::note_reduction(const void* address) {
  ++current_counts.reductions;
  auto& sectors = reductions_[current_->warp][current_->reductions++];
  if (sectors.insert(reinterpret_cast<uint64_t>(address) / kSectorBytes).second) ++current_counts.reduction_sectors;
}

void run(const Launch& launch) {
  if (active != nullptr) throw std::runtime_error("emulator: a launch from device code");
  const uint64_t threads = static_cast<uint64_t>(launch.block.x) * launch.block.y * launch.block.z;
  if (threads == 0 || threads > 1024)
    throw std::runtime_error("emulator: invalid number of threads per block in " + launch.kernel);
  const uint64_t count = static_cast<uint64_t>(launch.grid.x) * launch.grid.y * launch.grid.z;
  if (count == 0 || launch.grid.y > 65535 || launch.grid.z > 65535) {
    throw std::runtime_error("emulator: invalid grid in " + launch.kernel);
  }
  std::vector<uint64_t> order(count);
  for (uint64_t i = 0; i < count; ++i) order[i] = i;
  uint64_t random = current_seed * 2862933555777941757ULL + 3037000493ULL;
  for (uint64_t i = count; i > 1; --i) {
    random = random * 6364136223846793005ULL + 1442695040888963407ULL;
    std::swap(order[i - 1], order[(random >> 33) % i]);
  }
  std::vector<std::unique_ptr<Block>> flight;
  size_t begun = 0, chosen = 0;
  const auto next = [&] {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return random;
  };
  while (begun < count || !flight.empty()) {
    while (begun < count && flight.size() < kBlocksInFlight) {
      unsigned slot = 0;
      const auto taken = [&](const auto& block) { return block->slot() == slot; };
      while (std::any_of(flight.begin(), flight.end(), taken)) ++slot;
      flight.push_back(std::make_unique<Block>(launch, order[begun], current_seed + 3 * order[begun], slot));
      ++begun;
    }
    if (chosen >= flight.size() || next() % 64 == 0) chosen = next() % flight.size();
    Block& block = *flight[chosen];
    block.step();
    if (!block.finished()) continue;
    Blocks& blocks = block_counts[short_name(launch.kernel)];
    ++blocks.launched;
    blocks.idle += block.idle();
    flight.erase(flight.begin() + chosen);
  }
  count_sectors();
}

// ---- global memory ----
void register_memory(const std::string& name, const void* data, uint64_t bytes, bool writable) {
  const auto begin = reinterpret_cast<uint64_t>(data);
  if (bytes == 0) return;
  // All of memory in one range (a test of the ops, which allocate for themselves) is not counted.
  const size_t sectors = bytes > kMostCounted ? 0 : (begin + bytes - 1) / kSectorBytes - begin / kSectorBytes + 1;
  ranges.push_back({name, begin, begin + bytes, writable, std::vector<bool>(sectors), std::vector<bool>(sectors),
                    std::vector<Touch>(sectors == 0 || !writable ? 0 : (bytes + 1) / 2)});
}

void forget_memory() { ranges.clear(); }

std::map<std::string, Traffic> take_traffic() { return std::exchange(traffic, {}); }
std::map<std::string, Blocks> take_blocks() { return std::exchange(block_counts, {}); }

// Blocks of one launch have no order: what one of them writes the others may neither write nor read, unless all of them add.
void check_blocks(Range& range, uint64_t address, uint64_t bytes, Access access, Where where) {
  Block& block = active_block();
  const auto me = static_cast<uint32_t>(block.number() + 1);
  const auto fail = [&](const char* what, uint32_t other) {
    const std::string who = other == kAdders          ? "blocks that add"
                            : other == kSeveralBlocks ? "several blocks"
                                                      : "block " + std::to_string(other - 1);
    block.fail("race in global memory: " + std::string(what) + " of " + range.name + ", " +
                   std::to_string(address - range.begin) + " bytes from its beginning, which " + who +
                   " of this launch accessed",
               where);
  };
  if (range.touches.empty()) return;
  for (uint64_t at = (address - range.begin) / 2; at < (address - range.begin + bytes + 1) / 2; ++at) {
    auto& [writer, reader, word] = range.touches[at];
    if (access == Access::kAdd) {
      if (writer != 0 && writer != me && writer != kAdders) fail("addition to a word", writer);
      if (reader != 0 && reader != me) fail("addition to a word", reader);
      writer = kAdders;
      continue;
    }
    if (writer != 0 && writer != me) fail(access == Access::kRead ? "read" : "write", writer);
    if (access == Access::kRead) {
      if (reader != me) word.read_epoch = 0;  // what another block's threads did
      reader = reader == 0 || reader == me ? me : kSeveralBlocks;
    } else {
      if (reader != 0 && reader != me) fail("write", reader);
      writer = me;
    }
    if (block.has_clocks()) continue;
    bool after_read = false;
    const uint16_t other = access == Access::kRead ? block.read_word(word) : block.write_word(word, true, &after_read);
    if (other != kNobody) {
      block.fail("race in global memory: " +
                     std::string(access == Access::kRead ? "read after write"
                                 : after_read            ? "write after read"
                                                         : "write after write") +
                     " of " + range.name + ", " + std::to_string(address - range.begin) +
                     " bytes from its beginning, no barrier since the access by " + name_of(other) + " of this block",
                 where);
    }
  }
}

void check_global(const void* address, uint64_t bytes, Access access, Where where) {
  const auto begin = reinterpret_cast<uint64_t>(address);
  const bool write = access != Access::kRead;
  Block& block = active_block();
  if (begin % bytes != 0) block.fail("misaligned access of " + std::to_string(bytes) + " bytes of global memory", where);
  const Range* nearest = nullptr;
  for (Range& range : ranges) {
    if (begin >= range.begin && begin + bytes <= range.end) {
      if (write && !range.writable) block.fail("write to " + range.name + ", which is only to be read", where);
      const uint64_t sector = begin / kSectorBytes - range.begin / kSectorBytes;  // an aligned access has a single one
      if (sector < range.read.size()) {
        if (access != Access::kWrite) range.read[sector] = true;
        if (write) range.written[sector] = true;
      }
      if (write) block.note_written();
      check_blocks(range, begin, bytes, access, where);
      range.asked += bytes;
      return;
    }
    if (begin + 4096 >= range.begin && begin < range.end + 4096) nearest = &range;
  }
  std::string what =
      std::string("out of bounds: ") + (write ? "write" : "read") + " of " + std::to_string(bytes) + " bytes of global memory";
  if (nearest != nullptr) {
    what += ", " + std::to_string(static_cast<int64_t>(begin - nearest->begin)) + " bytes from the beginning of " +
            nearest->name + " (" + std::to_string(nearest->end - nearest->begin) + " bytes)";
  }
  block.fail(what, where);
}

}  // namespace emulator
