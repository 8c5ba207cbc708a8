// The op that copies many tensors into others, such as gradients into the views of a bucket, with casts.
#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#include "ops/device.h"

namespace pytrain::ops {
namespace {

using Segment = cpu::CopyJob::Segment;
using torch::stable::detail::to;

// Below this many elements waking a second thread costs more than it brings, as in table.cpp.
constexpr int64_t grain_elements = 131072;

bool computes(Format format) {
  return format == Format::fp32 || format == Format::bf16 || format == Format::fp16 || format == Format::fp64;
}

// Whether the loops walk this pair: on one device that has kernels, and in memory order on both sides.
bool fits(const View& target, const View& source) {
  if (!target.usable || !source.usable || target.device != source.device || !has_kernels(target.device)) return false;
  if (!computes(target.format) || !computes(source.format)) return false;
  if ((target.format == Format::fp64) != (source.format == Format::fp64)) return false;
  if (!same_sizes(target, source)) return false;
  return (target.contiguous && source.contiguous) || (dense(target) && same_strides(target, source));
}

struct Extent {
  const char *begin, *end;
  int64_t index;
};

Extent extent(const void* data, Format format, int64_t numel, int64_t index) {
  const char* const begin = static_cast<const char*>(data);
  return {begin, begin + numel * bytes(format), index};
}

// The first pair that shares memory with one before it, but for a tensor that is its own source; -1 if none does.
// Then the order of copies would matter.
int64_t find_shared(const std::vector<Segment>& segments) {
  const auto none = static_cast<int64_t>(segments.size());
  int64_t found = none;
  std::vector<Extent> extents;
  for (int64_t i = 0; i < none; ++i) {
    if (segments[i].numel) extents.push_back(extent(segments[i].to, segments[i].to_format, segments[i].numel, i));
  }
  const auto before = [](const Extent& a, const Extent& b) { return a.begin < b.begin; };
  if (!std::is_sorted(extents.begin(), extents.end(), before)) std::sort(extents.begin(), extents.end(), before);
  for (size_t k = 1; k < extents.size(); ++k) {
    Extent &last = extents[k - 1], &here = extents[k];
    if (here.begin < last.end) found = std::min(found, std::max(here.index, last.index));
    here.end = std::max(here.end, last.end);  // so that ends rise too
  }
  if (found < none) return found;
  for (int64_t i = 0; i < none; ++i) {
    const Segment& s = segments[i];
    if (s.numel == 0) continue;
    const Extent source = extent(s.from, s.from_format, s.numel, i);
    const auto after = [](const char* begin, const Extent& e) { return begin < e.end; };
    auto at = std::upper_bound(extents.begin(), extents.end(), source.begin, after);
    for (; at != extents.end() && at->begin < source.end; ++at) {
      const bool itself = at->index == i && s.from == s.to && s.from_format == s.to_format;
      if (!itself) found = std::min(found, std::max(at->index, i));
    }
  }
  return found < none ? found : -1;
}

// As few launches as carry all pairs of these formats on this device.
void launch(Queue& queue, const std::vector<Segment>& segments, double scale, bool accumulate) {
  const cuda::Backend& backend = queue.backend();
  const int64_t width = backend.multiprocessors(queue.device());
  queue.run([&](void* stream) {
    cuda::Copies job{};
    job.to_format = segments[0].to_format;
    job.from_format = segments[0].from_format;
    job.scale = scale;
    job.accumulate = accumulate;
    const auto send = [&] { queue.check(backend.copy(job, width, stream), "_copy"); };
    for (const Segment& segment : segments) {
      if (job.n == cuda::Copies::most) {
        send();
        job.n = job.n_chunks = 0;
      }
      job.pairs[job.n++] = {segment.to, segment.from, segment.numel, job.n_chunks};
      job.n_chunks += (segment.numel + cuda::chunk - 1) / cuda::chunk;
    }
    send();
  });
}

void copy_on_device(int64_t device, const std::vector<Segment>& segments, double scale, bool accumulate) {
  Queue queue(device);
  std::vector<std::pair<std::pair<Format, Format>, std::vector<Segment>>> kinds;
  for (const Segment& segment : segments) {
    if (segment.numel == 0) continue;
    const std::pair formats(segment.to_format, segment.from_format);
    auto kind = std::find_if(kinds.begin(), kinds.end(), [&](const auto& k) { return k.first == formats; });
    if (kind == kinds.end()) kind = kinds.insert(kinds.end(), {formats, {}});
    kind->second.push_back(segment);
  }
  for (const auto& kind : kinds) launch(queue, kind.second, scale, accumulate);
}

void copy_on_cpu(const std::vector<Segment>& segments, double scale, bool accumulate) {
  std::vector<int64_t> offsets;
  int64_t total = 0;
  for (const Segment& segment : segments) {
    offsets.push_back(total);
    total += segment.numel;
  }
  const cpu::CopyJob job{segments.data(), offsets.data(), static_cast<int64_t>(segments.size()), scale, accumulate};
  const cpu::Kernels& kernels = cpu::current_kernels();
  torch::stable::parallel_for(0, total, total > grain_elements ? 1 : grain_elements,
                              [&](int64_t begin, int64_t end) { kernels.copy(job, begin, end); });
}

// _copy(Tensor(a!)[] to, Tensor[] sources, float scale, bool accumulate) -> int
// to[i] <- sources[i] * scale, or to[i] += sources[i] * scale, in fp32 (fp64 between fp64 tensors), each operation
// rounded; a scale of 1 copies bits where the dtypes agree. Returns -1, or the first i whose tensors these loops do not
// take (another device, dtype or strides, or memory that an earlier pair uses too); then nothing was written.
void copy(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList targets(stack[0]), sources(stack[1]);
  const auto scale = to<double>(stack[2]);
  const auto accumulate = to<bool>(stack[3]);
  STD_TORCH_CHECK(targets.size() == sources.size(), "_copy: to has ", targets.size(), " tensors, sources has ",
                  sources.size());
  std::vector<Segment> segments(targets.size());
  std::vector<int64_t> devices;  // each once
  std::vector<int64_t> of(targets.size());
  for (int64_t i = 0; i < targets.size(); ++i) {
    const View target = view(targets[i], true), source = view(sources[i], false);
    if (!fits(target, source)) {
      stack[0] = torch::stable::detail::from(i);
      return;
    }
    segments[i] = {target.data, source.data, target.numel, target.format, source.format};
    of[i] = target.device;
    if (std::find(devices.begin(), devices.end(), of[i]) == devices.end()) devices.push_back(of[i]);
  }
  const int64_t shared = find_shared(segments);
  stack[0] = torch::stable::detail::from(shared);
  if (shared >= 0) return;
  for (const int64_t device : devices) {
    std::vector<Segment> here;
    for (size_t i = 0; i < segments.size(); ++i) {
      if (of[i] == device) here.push_back(segments[i]);
    }
    if (backend_of(device)) {
      copy_on_device(device, here, scale, accumulate);
    } else {
      copy_on_cpu(here, scale, accumulate);
    }
  }
}

}  // namespace
}  // namespace pytrain::ops

STABLE_TORCH_LIBRARY_FRAGMENT(pytrain, m) {
  m.def("_copy(Tensor(a!)[] to, Tensor[] sources, float scale, bool accumulate) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(pytrain, CompositeExplicitAutograd, m) { m.impl("_copy", &pytrain::ops::copy); }
