#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "check.h"
#include "kts/routing.h"
#include "kts/workspace.h"

namespace kts::test {

KTS_TEST(the_arena_counts_what_it_hands_out) {
  Arena counting;
  counting.take<float>(3);
  counting.take<char>(100);
  counting.take<double>(1);
  PageBuffer memory(counting.used());
  Arena arena(memory.data(), memory.bytes());
  float* a = arena.take<float>(3);
  char* b = arena.take<char>(100);
  double* c = arena.take<double>(1);
  KTS_EXPECT(arena.used() == counting.used());
  KTS_EXPECT(reinterpret_cast<uintptr_t>(b) % 64 == 0 && reinterpret_cast<uintptr_t>(c) % 64 == 0);
  KTS_EXPECT(reinterpret_cast<char*>(a + 3) <= b && b + 100 <= reinterpret_cast<char*>(c));
}

KTS_TEST(large_buffers_begin_at_a_huge_page) {
  std::vector<PageBuffer> buffers;  // side by side, so that a lucky address does not pass for aligned
  for (const size_t bytes : {kHugePage, kHugePage + 1, 3 * kHugePage - 1, size_t{5} << 20, size_t{100}})
    for (int i = 0; i < 3; ++i) {
      buffers.emplace_back(bytes);
      const PageBuffer& buffer = buffers.back();
      const uintptr_t unit = bytes < kHugePage ? static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)) : kHugePage;
      KTS_EXPECT(reinterpret_cast<uintptr_t>(buffer.data()) % unit == 0) << bytes;
      char* memory = static_cast<char*>(buffer.data());
      KTS_EXPECT(buffer.bytes() == bytes && memory[0] == 0 && memory[bytes - 1] == 0);
      std::memset(memory, 1, bytes);
    }
}

KTS_TEST(a_buffer_that_cannot_fit_is_refused) {
  for (const size_t bytes : {SIZE_MAX, SIZE_MAX / 2}) {
    bool refused = false;
    try {
      PageBuffer buffer(bytes);
    } catch (const std::bad_alloc&) {
      refused = true;
    }
    KTS_EXPECT(refused) << bytes;
  }
}

KTS_TEST(the_pass_arena_grows_once_per_size) {
  pass_arena(1 << 22);
  const int64_t growths = pass_arena_growths();
  for (int i = 0; i < 5; ++i) pass_arena(1 << 22);
  KTS_EXPECT(pass_arena_growths() == growths);
}

KTS_TEST(routing_groups_rows_and_skips_sentinels) {
  const std::vector<int64_t> ids = {2, 0, 2, 2, 9, 5, 0, 4};  // 4 tokens x 2; 5 experts, so 9 and 5 are sentinels
  std::vector<int64_t> offsets(6);
  std::vector<int32_t> active(5), token(8), pair(8);
  Routing routing{0, 0, offsets.data(), active.data(), token.data(), pair.data()};
  group_by_expert(ids.data(), 4, 2, 5, &routing);
  KTS_EXPECT(routing.num_rows == 6 && routing.num_active == 3);
  KTS_EXPECT((offsets == std::vector<int64_t>{0, 2, 2, 5, 5, 6}));
  KTS_EXPECT(active[0] == 0 && active[1] == 2 && active[2] == 4);
  const std::vector<int32_t> want = {1, 6, 0, 2, 3, 7};
  for (size_t i = 0; i < want.size(); ++i) KTS_EXPECT(pair[i] == want[i] && token[i] == want[i] / 2) << "row " << i;
}

}  // namespace kts::test
