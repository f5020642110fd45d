// Fake quantization on a uniform grid in one pass over the tensor, and its gradient in another, for float32 on a CPU.
//
// It computes what the composition in affine.py computes: the value and the gradient with respect to the tensor bit for bit,
// sums in another order. What it does not serve it leaves to the composition: it returns None.
//
// A tensor is taken as rows of equal length that lie one after the other in memory; all elements of a row share a scale, a
// zero point and a factor. One scale for a whole tensor is one row.

#include <ATen/Parallel.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
namespace py = pybind11;

// Elements of one part of a row. A constant, so that sums do not depend on the number of threads.
constexpr int64_t PART = 1 << 14;

// Elements for which a thread is worth its start; ATen takes as many for its own elementwise functions.
constexpr int64_t PER_THREAD = 1 << 15;

// Sums run in this many lanes side by side, as many as the widest registers hold, on every machine alike.
constexpr int64_t LANES = 16;

// Terms that are added up in float32 before the sum goes on in double. Of 64 terms a lane the error is at most 64 roundings,
// 2 ** -24 each of all absolute terms: less than 4e-6 of them.
constexpr int64_t BLOCK = 64 * LANES;

// A row takes some 30 ns of its own, in which the composition computes a dozen elements: of more and shorter rows than these
// the composition is faster.
constexpr int64_t SHORT = 16, MANY = 512;

constexpr float EPS = std::numeric_limits<float>::epsilon();  // the smallest scale, see ranges.py

enum class GradScaling : int64_t { none, term, parts };  // see contracts.Uniform

enum class Granularity : int64_t { tensor, token, channel, group };  // see granularity.py

// How a quantizer reads its qparams: the fields of contracts.Uniform, and those of its scheme.
struct Uniform {
  int64_t low, high;
  bool reciprocal, whole, learned;
  GradScaling grad_scaling;
  Granularity granularity;
  int64_t axis;        // of channels
  int64_t size;        // of a group
  int64_t large;       // elements from which on the composition is that of eager.py
  std::string config;  // of the quantizer, from which kernels.py makes it again

  // As data that a graph of autograd keeps, and that a compiler of graphs can compare.
  c10::IValue stored() const {
    return c10::ivalue::Tuple::create(std::vector<c10::IValue>{low, high, reciprocal, whole, learned, int64_t(grad_scaling),
                                                               int64_t(granularity), axis, size, large, config});
  }

  static Uniform of(const c10::IValue& stored) {
    const auto& v = stored.toTupleRef().elements();
    return {v[0].toInt(), v[1].toInt(), v[2].toBool(), v[3].toBool(), v[4].toBool(), GradScaling(v[5].toInt()),
            Granularity(v[6].toInt()), v[7].toInt(), v[8].toInt(), v[9].toInt(), v[10].toStringRef()};
  }
};

// What the composition adds to each value: where it has terms for derivatives, which are 0, they turn -0.0 into 0.0, as a
// 0.0 does that is added. An added -0.0 changes nothing.
float addend(const Uniform& uniform, const Tensor& x, bool is_recording) {
  return is_recording && x.numel() < uniform.large ? 0.0f : -0.0f;
}

// The grid of one row.
struct Grid {
  float divisor;  // the scale, or with `reciprocal` 1 / scale
  float step;     // distance of two neighbouring outputs: the scale, divided by the factor
  float zero;
  float factor;
  bool dead;  // the factor is 0, and the output is x
};

// Sums over a row, or over a part of one.
struct Sums {
  double slope = 0;    // of g dy/dstep
  double outside = 0;  // of g where the code lies outside the bounds
};

// Comparisons instead of min and max, so that NaN stays NaN.
template <typename T>
T clamped(T code, T low, T high) {
  code = code > high ? high : code;
  return code < low ? low : code;
}

template <bool RECIPROCAL, bool ZERO>
void write_value(const float* x, float* y, int64_t n, const Grid grid, float low, float high, float added) {
  for (int64_t i = 0; i < n; ++i) {
    const float scaled = x[i] * grid.factor;
    const float ratio = RECIPROCAL ? scaled * grid.divisor : scaled / grid.divisor;
    float code = std::nearbyint(ZERO && !RECIPROCAL ? ratio + grid.zero : ratio);
    if (ZERO && RECIPROCAL) code += grid.zero;
    code = clamped(code, low, high);
    if (ZERO) code -= grid.zero;
    y[i] = code * grid.step + added;
  }
}

// The gradient to x of n elements, and the terms of the sums.
template <bool RECIPROCAL, bool ZERO, bool SUMS>
void write_terms(const float* __restrict g, const float* __restrict x, float* __restrict gx, int64_t n, const Grid grid,
                 float low, float high, float* __restrict slope, float* __restrict outside) {
  for (int64_t i = 0; i < n; ++i) {
    const float given = g[i];
    const float scaled = x[i] * grid.factor;
    const float ratio = RECIPROCAL ? scaled * grid.divisor : scaled / grid.divisor;
    float code = std::nearbyint(ZERO && !RECIPROCAL ? ratio + grid.zero : ratio);
    if (ZERO && RECIPROCAL) code += grid.zero;
    const float inner = clamped(code, low, high);
    const bool inside = (code >= low) & (code <= high);  // without a branch; false for NaN
    gx[i] = inside ? given : 0.0f;
    if (SUMS) {
      const float level = ZERO ? inner - grid.zero : inner;
      const float within = inside ? ratio : 0.0f;
      slope[i] = (level - within) * given;
      if (ZERO) outside[i] = inside ? 0.0f : given;
    }
  }
}

// The sum of n terms, at most BLOCK.
double sum(const float* terms, int64_t n) {
  float lanes[LANES] = {};
  const int64_t whole = n - n % LANES;
  for (int64_t i = 0; i < whole; i += LANES)
    for (int64_t lane = 0; lane < LANES; ++lane) lanes[lane] += terms[i + lane];
  double total = 0;
  for (const float lane : lanes) total += lane;
  for (int64_t i = whole; i < n; ++i) total += terms[i];
  return total;
}

template <bool RECIPROCAL, bool ZERO, bool SUMS>
Sums gradient(const float* g, const float* x, float* gx, int64_t n, const Grid grid, float low, float high) {
  Sums sums;
  float slope[BLOCK], outside[BLOCK];
  for (int64_t start = 0; start < n; start += BLOCK) {
    const int64_t count = std::min(BLOCK, n - start);
    write_terms<RECIPROCAL, ZERO, SUMS>(g + start, x + start, gx + start, count, grid, low, high, slope, outside);
    if (SUMS) sums.slope += sum(slope, count);
    if (SUMS && ZERO) sums.outside += sum(outside, count);
  }
  return sums;
}

using WriteValue = void (*)(const float*, float*, int64_t, Grid, float, float, float);
using Gradient = Sums (*)(const float*, const float*, float*, int64_t, Grid, float, float);

WriteValue write_value_of(bool reciprocal, bool zero) {
  if (reciprocal) return zero ? write_value<true, true> : write_value<true, false>;
  return zero ? write_value<false, true> : write_value<false, false>;
}

template <bool SUMS>
Gradient gradient_of(bool reciprocal, bool zero) {
  if (reciprocal) return zero ? gradient<true, true, SUMS> : gradient<true, false, SUMS>;
  return zero ? gradient<false, true, SUMS> : gradient<false, false, SUMS>;
}

// The tensors of one call, and how the first of them is cut into rows.
struct Call {
  const Uniform& uniform;
  const Tensor& x;
  const Tensor& scale;
  const std::optional<Tensor>& zero;
  const std::optional<Tensor>& factor;
  int64_t length;  // of a row

  int64_t rows() const { return x.numel() / length; }

  int64_t parts_of_row() const { return (length + PART - 1) / PART; }

  // Row r has the scale r % scales, since rows may be those of several samples, one after the other.
  int64_t scale_of(int64_t row) const { return row % scale.numel(); }

  // LSQ's factor of gradients, as _integer.py computes it.
  float grad_factor() const {
    if (uniform.grad_scaling == GradScaling::none) return 1;
    const double elements = double(x.numel()) / double(scale.numel());
    return float(1 / std::sqrt(elements * double(uniform.high)));
  }

  // The value of a learned number in the forward pass, whose gradient is scaled.
  float scaled(float value, float factor) const {
    if (uniform.grad_scaling != GradScaling::parts) return value;
    const float part = value * factor;
    return (value - part) + part;
  }

  float scale_at(int64_t k, float grad_factor) const {
    const float value = scale.const_data_ptr<float>()[k];
    if (!uniform.learned) return value;
    const float size = std::abs(value);
    return scaled(size < EPS ? EPS : size, grad_factor);
  }

  // The zero point as it is learned, before it is made a code.
  float given_zero_at(int64_t k, float grad_factor) const {
    if (zero->scalar_type() == at::kInt) return float(zero->const_data_ptr<int>()[k]);
    const float value = zero->const_data_ptr<float>()[k];
    return uniform.learned ? scaled(value, grad_factor) : value;
  }

  float zero_at(int64_t k, float grad_factor) const {
    const float given = given_zero_at(k, grad_factor);
    if (!uniform.whole) return given;
    // 0 is added, so that it is never -0.0
    return std::nearbyint(clamped(given, float(uniform.low), float(uniform.high))) + 0.0f;
  }

  float factor_at(int64_t row) const {
    return factor ? factor->const_data_ptr<float>()[row % factor->numel()] : 1.0f;
  }

  Grid grid(int64_t row, float grad_factor) const {
    const int64_t k = scale_of(row);
    const float size = scale_at(k, grad_factor), given = factor_at(row);
    const bool dead = given == 0;
    const float divided = dead ? 1.0f : given;
    const float divisor = uniform.reciprocal ? 1.0f / size : size;
    return {divisor, factor ? size / divided : size, zero ? zero_at(k, grad_factor) : 0.0f, divided, dead};
  }
};

// Calls f(number, row, start, length) for each part of each row, in several threads where that pays.
template <typename F>
void for_each_part(const Call& call, const F& f) {
  const int64_t parts = call.parts_of_row();
  const int64_t grain = std::max<int64_t>(1, PER_THREAD / std::min(call.length, PART));
  at::parallel_for(0, call.rows() * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / parts, start = i % parts * PART;
      f(i, row, row * call.length + start, std::min(PART, call.length - start));
    }
  });
}

Tensor value(const Call& call, float added) {
  Tensor y = at::empty_like(call.x);
  const float* x = call.x.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  const WriteValue write = write_value_of(call.uniform.reciprocal, call.zero.has_value());
  const float grad_factor = call.grad_factor();
  for_each_part(call, [&](int64_t, int64_t row, int64_t at, int64_t n) {
    const Grid grid = call.grid(row, grad_factor);
    if (grid.dead)
      std::copy_n(x + at, n, out + at);
    else
      write(x + at, out + at, n, grid, float(call.uniform.low), float(call.uniform.high), added);
  });
  return y;
}

// The same, while other threads of Python may run.
Tensor value_without_lock(const Call& call, float added) {
  const py::gil_scoped_release released;
  return value(call, added);
}

// Gradients with respect to scale, zero point and factor, in double.
struct Totals {
  std::vector<double> scale, zero, factor;
};

// The sums over parts of rows, added up in one order, whatever the number of threads.
Totals added_up(const Call& call, const std::vector<Sums>& parts, float grad_factor) {
  const int64_t scales = call.scale.numel(), factors = call.factor ? call.factor->numel() : 1;
  Totals totals{std::vector<double>(scales), std::vector<double>(scales), std::vector<double>(factors)};
  const int64_t parts_of_row = call.parts_of_row();
  for (int64_t row = 0; row < call.rows(); ++row) {
    Sums sum;
    for (int64_t i = row * parts_of_row; i < (row + 1) * parts_of_row; ++i) {
      sum.slope += parts[i].slope;
      sum.outside += parts[i].outside;
    }
    // the step is scale / factor
    const Grid grid = call.grid(row, grad_factor);
    totals.scale[call.scale_of(row)] += sum.slope / grid.factor;
    totals.zero[call.scale_of(row)] -= sum.outside * grid.step;
    totals.factor[row % factors] -= sum.slope * grid.step / grid.factor;
  }
  return totals;
}

// A tensor like another, with f(k) as its element k.
template <typename F>
Tensor filled(const Tensor& like, const F& f) {
  Tensor result = at::empty_like(like);
  float* out = result.mutable_data_ptr<float>();
  for (int64_t k = 0; k < result.numel(); ++k) out[k] = float(f(k));
  return result;
}

// Gradients with respect to x, scale, zero point and factor; those that nobody needs are undefined.
variable_list gradients(const Call& call, const Tensor& given, const std::array<bool, 4>& needed) {
  const Uniform& uniform = call.uniform;
  const bool has_sums = needed[1] || needed[2] || needed[3], has_zero = call.zero.has_value();
  const Gradient run =
      has_sums ? gradient_of<true>(uniform.reciprocal, has_zero) : gradient_of<false>(uniform.reciprocal, has_zero);
  const Tensor g = given.strides() == call.x.strides() ? given : at::empty_like(call.x).copy_(given);
  Tensor gx = at::empty_like(call.x);
  const float *x = call.x.const_data_ptr<float>(), *in = g.const_data_ptr<float>();
  float* out = gx.mutable_data_ptr<float>();
  const float grad_factor = call.grad_factor();
  std::vector<Sums> parts(call.rows() * call.parts_of_row());
  for_each_part(call, [&](int64_t i, int64_t row, int64_t at, int64_t n) {
    const Grid grid = call.grid(row, grad_factor);
    if (grid.dead)
      std::copy_n(in + at, n, out + at);
    else
      parts[i] = run(in + at, x + at, out + at, n, grid, float(uniform.low), float(uniform.high));
  });
  variable_list result = {gx, Tensor(), Tensor(), Tensor()};
  if (!has_sums) return result;

  const Totals totals = added_up(call, parts, grad_factor);
  const float* scale = call.scale.const_data_ptr<float>();
  if (needed[1])
    result[1] = filled(call.scale, [&](int64_t k) { return (scale[k] < 0 ? -1 : 1) * grad_factor * totals.scale[k]; });
  if (needed[2])
    result[2] = filled(*call.zero, [&](int64_t k) {
      const bool passes = !uniform.whole || std::isfinite(call.given_zero_at(k, grad_factor));
      return passes ? grad_factor * totals.zero[k] : 0.0;
    });
  if (needed[3]) result[3] = filled(*call.factor, [&](int64_t k) { return totals.factor[k]; });
  return result;
}

// Whether a mode, a transform or a tracer of torch would have to see the computation.
bool is_watched() {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet watchers(
      {DispatchKey::FuncTorchDynamicLayerFrontMode, DispatchKey::Python, DispatchKey::Tracer, DispatchKey::Functionalize});
  return c10::impl::TorchDispatchModeTLS::stack_len() > 0 ||
         c10::impl::tls_local_dispatch_key_set().included_.has_any(watchers);
}

// Whether a tensor's numbers lie here, as they are: no wrapper, no class of its own, no tangent.
bool is_plain(const Tensor& t, at::ScalarType dtype) {
  return t.is_cpu() && t.scalar_type() == dtype && t.layout() == at::kStrided && !t.is_neg() && !t._is_zerotensor() &&
         !at::isTensorSubclassLike(t) && !t._fw_grad(0).defined();
}

Tensor without_gradient(const Tensor& t) { return t.requires_grad() ? t.detach() : t; }

// The tensor of a Python object, where it is of torch's own classes.
std::optional<Tensor> unpacked(const py::handle object) {
  if (!THPVariable_CheckExact(object.ptr())) return std::nullopt;
  return THPVariable_Unpack(object.ptr());
}

// A quantizer, and its data as a graph keeps it.
struct Quantizer {
  Uniform uniform;
  c10::IValue stored;
};

py::object as_python(const Tensor& t) {
  return t.defined() ? py::reinterpret_steal<py::object>(THPVariable_Wrap(t)) : py::none();
}

// The gradients of the composition, which can be differentiated again.
variable_list composed(const std::string& config, const Tensor& g, const variable_list& at,
                       const std::array<bool, 4>& needed) {
  const py::gil_scoped_acquire lock;
  const py::object gradients = py::module_::import("sophq_func.numerics.kernels").attr("gradients");
  const py::tuple tensors = py::make_tuple(as_python(at[0]), as_python(at[1]), as_python(at[2]), as_python(at[3]));
  variable_list result;
  for (const py::handle t : gradients(config, as_python(g), tensors, py::cast(needed)))
    result.push_back(t.is_none() ? Tensor() : THPVariable_Unpack(t.ptr()));
  return result;
}

int64_t row_length(const Uniform&, const Tensor&, const Tensor&, const std::optional<Tensor>&);

struct FakeQuantize : torch::autograd::Function<FakeQuantize> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero,
                        const std::optional<Tensor>& factor, const Quantizer& quantizer, int64_t length) {
    ctx->save_for_backward({x, scale, zero.value_or(Tensor()), factor.value_or(Tensor())});
    ctx->saved_data["quantizer"] = quantizer.stored;
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Uniform& uniform = quantizer.uniform;
    return value_without_lock({uniform, x, scale, zero, factor, length}, addend(uniform, x, true));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    constexpr int64_t BESIDE = 2;  // arguments that are no tensors
    const Tensor& g = grads[0];
    const variable_list saved = ctx->get_saved_variables();
    const Uniform uniform = Uniform::of(ctx->saved_data["quantizer"]);
    const auto given = [&](int i) { return saved[i].defined() ? std::make_optional(saved[i]) : std::nullopt; };
    const std::optional<Tensor> zero = given(2), factor = given(3);
    std::array<bool, 4> needed{};
    size_t edge = 0;
    for (int i = 0; i < 4; ++i) needed[i] = saved[i].defined() && ctx->needs_input_grad(edge++);
    variable_list result(4 + BESIDE);
    if (!g.defined()) return result;
    const bool is_kernel = !at::GradMode::is_enabled() && !is_watched() && is_plain(g, at::kFloat);
    const int64_t length = row_length(uniform, saved[0], saved[1], factor);
    const variable_list found = is_kernel ? gradients({uniform, saved[0], saved[1], zero, factor, length}, g, needed)
                                          : composed(uniform.config, g, saved, needed);
    for (int i = 0; i < 4; ++i)
      if (needed[i]) result[i] = found[i];
    return result;
  }
};

// How many elements of x lie behind each index of an axis.
int64_t behind(const Tensor& x, int64_t axis) {
  const auto sizes = x.sizes().slice(axis + 1);
  return std::accumulate(sizes.begin(), sizes.end(), int64_t(1), std::multiplies<>());
}

// The axis along which a factor has its elements: that of their number, where all others have length 1; -1 for one element.
std::optional<int64_t> axis_of(const Tensor& factor, const Tensor& x) {
  if (factor.numel() == 1) return -1;
  if (factor.dim() != x.dim()) return std::nullopt;
  for (int64_t axis = 0; axis < x.dim(); ++axis)
    if (factor.size(axis) == factor.numel() && factor.numel() == x.size(axis)) return axis;
  return std::nullopt;
}

// How long a row is; 0 where the shape of the scale is another than that of the granularity, or there are no such rows.
int64_t row_length(const Uniform& uniform, const Tensor& x, const Tensor& scale, const std::optional<Tensor>& factor) {
  const auto factor_axis = factor ? axis_of(*factor, x) : -1;
  if (!factor_axis) return 0;
  if (scale.dim() == 0) {  // one scale, whatever the granularity; rows are those of factors along the first axis
    if (*factor_axis > 0) return 0;
    return *factor_axis == 0 ? behind(x, 0) : x.numel();
  }
  if (x.dim() == 0) return 0;
  if (uniform.granularity == Granularity::token)
    return *factor_axis == -1 && scale.sizes() == x.sizes().slice(0, x.dim() - 1) ? x.size(-1) : 0;
  if (uniform.axis < -x.dim() || uniform.axis >= x.dim()) return 0;
  const int64_t axis = at::maybe_wrap_dim(uniform.axis, x.dim());
  const int64_t length = behind(x, axis);
  if (uniform.granularity == Granularity::channel) {
    const bool fits = scale.dim() == 1 && scale.size(0) == x.size(axis);
    return fits && (*factor_axis == -1 || *factor_axis == axis) ? length : 0;
  }
  if (uniform.granularity == Granularity::group) {
    const bool fits = axis == 0 && length % uniform.size == 0 && scale.dim() == 2 && scale.size(0) == x.size(0) &&
        scale.size(1) == length / uniform.size;
    return fits && *factor_axis == -1 ? uniform.size : 0;
  }
  return 0;
}

// Whether the rows of a tensor lie one after the other in memory, and are long enough.
bool is_in_rows(const Tensor& x, int64_t length) {
  if (length < SHORT && x.numel() / length > MANY) return false;
  if (x.is_contiguous()) return true;
  const bool is_first_axis = length == x.numel() || (x.numel() == x.size(0) * length && x.stride(0) == length);
  return is_first_axis && x.is_non_overlapping_and_dense();
}

// x, quantized and dequantized; None where the composition has to compute it.
py::object fake_quantize(const Quantizer& quantizer, const py::handle x_object, const py::handle scale_object,
                         const py::handle zero_object, const py::handle factor_object) {
  const Uniform& uniform = quantizer.uniform;
  const auto x = unpacked(x_object);
  auto scale = unpacked(scale_object);
  auto zero = zero_object.is_none() ? std::nullopt : unpacked(zero_object);
  const auto factor = factor_object.is_none() ? std::nullopt : unpacked(factor_object);
  if (!x || !scale || (!zero && !zero_object.is_none()) || (!factor && !factor_object.is_none())) return py::none();
  if (is_watched() || !is_plain(*x, at::kFloat) || !is_plain(*scale, at::kFloat) || x->numel() == 0) return py::none();
  if (!scale->is_contiguous()) return py::none();
  if (zero) {
    const bool is_known = is_plain(*zero, at::kFloat) || is_plain(*zero, at::kInt);
    if (!is_known || !zero->is_contiguous() || zero->sizes() != scale->sizes()) return py::none();
  }
  if (factor && !(is_plain(*factor, at::kFloat) && factor->is_contiguous())) return py::none();
  const int64_t length = row_length(uniform, *x, *scale, factor);
  if (length == 0 || !is_in_rows(*x, length)) return py::none();

  if (!uniform.learned) {
    scale = without_gradient(*scale);
    if (zero) zero = without_gradient(*zero);
  }
  const bool is_differentiated = at::GradMode::is_enabled() &&
      (x->requires_grad() || scale->requires_grad() || (zero && zero->requires_grad()) ||
       (factor && factor->requires_grad()));
  // tensors of torch.inference_mode cannot be kept for a backward pass
  if (is_differentiated && (x->is_inference() || scale->is_inference())) return py::none();
  const Tensor y = is_differentiated
      ? FakeQuantize::apply(*x, *scale, zero, factor, quantizer, length)
      : value_without_lock({uniform, *x, *scale, zero, factor, length}, addend(uniform, *x, at::GradMode::is_enabled()));
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(y));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  // local, since another version of the library may be in the process, too
  py::class_<Quantizer>(module, "Quantizer", py::module_local())
      .def(py::init([](int64_t low, int64_t high, bool reciprocal, bool whole, bool learned, int64_t grad_scaling,
                       int64_t granularity, int64_t axis, int64_t size, int64_t large, const std::string& config) {
        const Uniform uniform{low,  high, reciprocal, whole, learned, GradScaling(grad_scaling), Granularity(granularity),
                              axis, size, large,      config};
        return Quantizer{uniform, uniform.stored()};
      }))
      .def("__call__", &fake_quantize);
}
