// Nearest code, and what training needs of the choice, for compiled.py: plain C functions without torch and without global state.
//
// A score is x.c - |c|^2 / 2, taken around an origin amid the codes. Vectors lie across the lanes of a register, a panel of them
// against a tile of codes at a time, so that scores never leave the registers: of a tile only its largest score goes on, into a race for
// the best tile and the runner-up of each vector. A runner-up within the error bound of the scores leaves a vector in doubt, and a vector
// in doubt is settled by explicit differences to all codes. In the best tile the few codes within the bound are told apart likewise.
//
// Scores are exact products of integers (16 bits, rounded from the vectors; the bound comes from what rounding took away) where the
// processor multiplies these twice as fast as floats, and floats elsewhere.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kTile = 8, kPanel = 3;  // of a register; codes of a tile; registers of vectors in a panel
#elif defined(__AVX__)
constexpr int kBytes = 32, kTile = 4, kPanel = 3;
#elif defined(__aarch64__)
constexpr int kBytes = 16, kTile = 8, kPanel = 3;
#else
constexpr int kBytes = 16, kTile = 4, kPanel = 2;
#endif

constexpr int64_t kDoubt = -2;
constexpr int64_t kMinWork = int64_t(1) << 21;  // products that pay for one more thread

template <class T, int bytes>
struct Simd {
    typedef T type __attribute__((vector_size(bytes)));
};
template <class T, int bytes = kBytes>
using Vec = typename Simd<T, bytes>::type;
template <class T>
using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
template <class T>
constexpr int kLanes = kBytes / int(sizeof(T));

template <class V, class T>
inline V load(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class T, class V>
inline void store(T* to, V v) {
    std::memcpy(to, &v, sizeof v);
}

template <class V, class T>
inline V splat(T value) {
    return V{} + value;
}

template <class V>
inline V larger(V a, V b) {
    return a > b ? a : b;
}

template <class V>
inline V smaller(V a, V b) {
    return a < b ? a : b;
}

// ---------------------------------------------------------------------------------------------------------------- memory and threads

template <class T>
class Buffer {
   public:
    explicit Buffer(size_t size) : data_(static_cast<T*>(::operator new(std::max<size_t>(size, 1) * sizeof(T), std::align_val_t(64)))) {}
    T* get() const { return data_.get(); }
    T& operator[](size_t i) const { return data_.get()[i]; }

   private:
    struct Free {
        void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
    };
    std::unique_ptr<T, Free> data_;
};

// task(worker, i) for each i < count; worker < threads. Threads live for this call alone: nothing to go stale in a forked process.
template <class Task>
void in_parallel(int threads, int64_t count, const Task& task) {
    threads = int(std::min<int64_t>(threads, count));
    std::atomic<int64_t> next{0};
    auto work = [&](int worker) {
        for (int64_t i = next++; i < count; i = next++) task(worker, i);
    };
    std::vector<std::thread> others;
    others.reserve(std::max(threads, 1));
    try {
        for (int worker = 1; worker < threads; ++worker) others.emplace_back(work, worker);
    } catch (const std::system_error&) {  // no more threads to be had: those that there are do the work
    }
    work(0);
    for (auto& other : others) other.join();
}

int threads_for(int threads, double work) { return int(std::max(1.0, std::min(double(threads), work / kMinWork))); }

// ------------------------------------------------------------------------------------------------------------------------ the problem

template <class T>
struct Problem {
    const T* x;
    const T* codes;
    int64_t num, size, width, x_stride;  // vectors, codes; from one vector to the next
    int64_t* index;
    const T* vector(int64_t i) const { return x + i * x_stride; }
    const T* code(int64_t c) const { return codes + c * width; }
};

template <class T>
std::vector<T> origin_of(const Problem<T>& p) {
    std::vector<double> sum(p.width);
    const int64_t step = (p.size + 255) / 256;  // a point amid the codes is enough, whatever it is exactly
    int64_t used = 0;
    for (int64_t c = 0; c < p.size; c += step, ++used)
        for (int64_t k = 0; k < p.width; ++k) sum[k] += p.code(c)[k];
    std::vector<T> origin(p.width);
    for (int64_t k = 0; k < p.width; ++k) origin[k] = T(sum[k] / double(used));
    return origin;
}

template <class T>
T squared_distance(const T* a, const T* b, int64_t width) {
    T sum = 0;
    for (int64_t k = 0; k < width; ++k) sum += (a[k] - b[k]) * (a[k] - b[k]);
    return sum;
}

// The nearest code of each vector row[0 ... num - 1] by explicit differences to all codes; at most as many as there are lanes.
template <class T>
void settle(const Problem<T>& p, const int64_t* row, int num, T* scratch) {
    using V = Vec<T>;
    using I = Vec<Int<T>>;
    constexpr int L = kLanes<T>;
    for (int r = 0; r < L; ++r) {
        const T* from = p.vector(row[std::min(r, num - 1)]);
        for (int64_t k = 0; k < p.width; ++k) scratch[k * L + r] = from[k];
    }
    V best = splat<V>(std::numeric_limits<T>::infinity());
    I where = I{} - 1, broken{};
    for (int64_t first = 0; first < p.size; first += kTile) {
        const T* code[kTile];
        for (int j = 0; j < kTile; ++j) code[j] = p.code(std::min(first + j, p.size - 1));
        V distance[kTile] = {};
        for (int64_t k = 0; k < p.width; ++k) {
            const V x = load<V>(scratch + k * L);
#pragma GCC unroll 8
            for (int j = 0; j < kTile; ++j) {
                const V difference = x - code[j][k];
                distance[j] = distance[j] + difference * difference;
            }
        }
        for (int j = 0; j < kTile; ++j) {
            where = distance[j] < best ? I{} + Int<T>(std::min(first + j, p.size - 1)) : where;
            best = smaller(distance[j], best);
            broken |= distance[j] != distance[j];
        }
    }
    for (int r = 0; r < num; ++r) p.index[row[r]] = broken[r] ? -1 : where[r];
}

// ----------------------------------------------------------------------------------------------------------------------------- scores

// What scores are made of: `Step`, the unit that lies in a lane; how two of them multiply into a sum.
template <class T>
struct Floats {
    using Step = T;
    template <class V>
    static V add_product(V sum, V a, V b) {
        return sum + a * b;
    }
};

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define VQKIT_PAIRS 1
struct Pairs {  // two 16-bit integers in a lane; sums of 32 bits that wrap around, and are right where the whole sum fits
    using Step = int32_t;
#if defined(__AVX512VNNI__)
    static Vec<int32_t, 64> add_product(Vec<int32_t, 64> sum, Vec<int32_t, 64> a, Vec<int32_t, 64> b) {
        return (Vec<int32_t, 64>)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
    }
#endif
    static Vec<int32_t, 32> add_product(Vec<int32_t, 32> sum, Vec<int32_t, 32> a, Vec<int32_t, 32> b) {
#if defined(__AVXVNNI__)
        return (Vec<int32_t, 32>)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#else
        return (Vec<int32_t, 32>)_mm256_dpwssd_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#endif
    }
    static Vec<int32_t, 16> add_product(Vec<int32_t, 16> sum, Vec<int32_t, 16> a, Vec<int32_t, 16> b) {
#if defined(__AVXVNNI__)
        return (Vec<int32_t, 16>)_mm_dpwssd_avx_epi32((__m128i)sum, (__m128i)a, (__m128i)b);
#else
        return (Vec<int32_t, 16>)_mm_dpwssd_epi32((__m128i)sum, (__m128i)a, (__m128i)b);
#endif
    }
};
#else
#define VQKIT_PAIRS 0
#endif

// The race of a panel: for each lane the largest score of any tile, its tile, and the largest of all other tiles.
// panel [steps, kPanel registers]; codes [tiles, steps, kTile]; start [tiles, kTile], what each sum starts from.
template <class P, int registers>
void race(const typename P::Step* panel, int64_t steps, const typename P::Step* codes, const typename P::Step* start, int64_t tiles,
          typename P::Step* best_score, typename P::Step* second_score, Int<typename P::Step>* best_tile) {
    using S = typename P::Step;
    using V = Vec<S>;
    using I = Vec<Int<S>>;
    constexpr int L = kLanes<S>;
    constexpr S lowest = std::is_integral<S>::value ? std::numeric_limits<S>::min() : -std::numeric_limits<S>::infinity();
    V best[registers], second[registers];
    I where[registers];
    for (int i = 0; i < registers; ++i) best[i] = second[i] = splat<V>(lowest), where[i] = I{};
    for (int64_t tile = 0; tile < tiles; ++tile, start += kTile) {
        V score[registers][kTile];
#pragma GCC unroll 8
        for (int j = 0; j < kTile; ++j)
#pragma GCC unroll 4
            for (int i = 0; i < registers; ++i) score[i][j] = splat<V>(start[j]);
        const S* from = panel;
        for (int64_t s = 0; s < steps; ++s, from += kPanel * L, codes += kTile) {
            V x[registers];
#pragma GCC unroll 4
            for (int i = 0; i < registers; ++i) x[i] = load<V>(from + i * L);
#pragma GCC unroll 8
            for (int j = 0; j < kTile; ++j) {
                const V code = splat<V>(codes[j]);
#pragma GCC unroll 4
                for (int i = 0; i < registers; ++i) score[i][j] = P::add_product(score[i][j], x[i], code);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < registers; ++i) {
            V top = score[i][0];
#pragma GCC unroll 8
            for (int j = 1; j < kTile; ++j) top = larger(score[i][j], top);
            where[i] = top > best[i] ? splat<I>(Int<S>(tile)) : where[i];
            second[i] = larger(smaller(top, best[i]), second[i]);
            best[i] = larger(top, best[i]);
        }
    }
    for (int i = 0; i < registers; ++i) {
        store(best_score + i * L, best[i]);
        store(second_score + i * L, second[i]);
        store(best_tile + i * L, where[i]);
    }
}

template <class P>
void race(int registers, const typename P::Step* panel, int64_t steps, const typename P::Step* codes, const typename P::Step* start,
          int64_t tiles, typename P::Step* best, typename P::Step* second, Int<typename P::Step>* where) {
    static_assert(kPanel <= 3);
    if (registers == 1) race<P, 1>(panel, steps, codes, start, tiles, best, second, where);
    else if (registers == 2 || kPanel == 2) race<P, 2>(panel, steps, codes, start, tiles, best, second, where);
    else race<P, kPanel>(panel, steps, codes, start, tiles, best, second, where);
}

// The scores of the codes of one tile for one lane of a panel, in the arithmetic of the race.
template <class P>
Vec<typename P::Step, kTile * sizeof(typename P::Step)> tile_scores(const typename P::Step* lane, int64_t steps,
                                                                    const typename P::Step* codes, const typename P::Step* start) {
    using S = typename P::Step;
    using V = Vec<S, kTile * sizeof(S)>;
    V score = load<V>(start);
    for (int64_t s = 0; s < steps; ++s) score = P::add_product(score, splat<V>(lane[s * kPanel * kLanes<S>]), load<V>(codes + s * kTile));
    return score;
}

// The code of vector `row` whose best score is that of `tile`: the one code within the bound of it, or the nearest of these.
template <class T, class V, class M>
int64_t choose(const Problem<T>& p, int64_t row, int64_t tile, V score, M least) {
    int64_t chosen = kDoubt;
    T smallest = 0;
    for (int j = 0; j < kTile; ++j) {
        if (!(M(score[j]) >= least)) continue;
        const int64_t code = tile * kTile + j;
        if (chosen == kDoubt) {
            chosen = code;
            continue;
        }
        if (smallest == 0) smallest = squared_distance(p.vector(row), p.code(chosen), p.width);
        const T distance = squared_distance(p.vector(row), p.code(code), p.width);
        if (distance < smallest) chosen = code, smallest = distance;
    }
    return chosen;
}

// --------------------------------------------------------------------------------------------------------------- codes made ready

template <class S>
struct Packed {
    int64_t steps, tiles;
    Buffer<S> codes, start;  // [tiles, steps, kTile], [tiles, kTile]
    Packed(int64_t steps, int64_t size)
        : steps(steps), tiles((size + kTile - 1) / kTile), codes(size_t(tiles) * steps * kTile), start(size_t(tiles) * kTile) {}
};

// The largest of `values`, NaN if any is.
template <class T>
T largest(const T* values, int64_t num) {
    T most = 0;
    for (int64_t i = 0; i < num; ++i) {
        if (!(values[i] <= most)) most = values[i];
        if (most != most) break;
    }
    return most;
}

template <class T>
struct Centred {
    std::vector<T> origin;
    Packed<T> packed;
    Buffer<double> half_norm;  // [tiles, kTile]
    T radius;                  // the largest length of a code around the origin

    Centred(const Problem<T>& p, int threads) : origin(origin_of(p)), packed(p.width, p.size), half_norm(packed.tiles * kTile) {
        const int64_t at_once = std::max<int64_t>(1, 32768 / (kTile * (p.width + 1)));
        in_parallel(threads_for(threads, 16.0 * p.size * p.width), (packed.tiles + at_once - 1) / at_once, [&](int, int64_t task) {
            for (int64_t t = task * at_once; t < std::min(packed.tiles, (task + 1) * at_once); ++t) pack(p, t);
        });
        radius = std::sqrt(T(2) * T(largest(half_norm.get(), p.size))) * (T(1) + std::numeric_limits<T>::epsilon() * 4);
    }

    void pack(const Problem<T>& p, int64_t tile) {
        T* to = packed.codes.get() + tile * packed.steps * kTile;
        for (int j = 0; j < kTile; ++j) {
            const int64_t c = tile * kTile + j;
            double squares = 0;
            for (int64_t k = 0; k < p.width; ++k) {
                const T value = c < p.size ? p.code(c)[k] - origin[k] : T(0);
                to[k * kTile + j] = value;
                squares += double(value) * double(value);
            }
            half_norm[c] = 0.5 * squares;
            packed.start[c] = c < p.size ? T(-0.5 * squares) : -std::numeric_limits<T>::infinity();
        }
    }
};

// -------------------------------------------------------------------------------------------------------------- panels of vectors

template <class T>
struct Scratch {
    Buffer<T> panel;
    Buffer<int32_t> pairs;
    explicit Scratch(int64_t width) : panel(width * kPanel * kLanes<T>), pairs((width + 1) / 2 * kPanel * kLanes<int32_t>) {}
};

// Vectors first ... first + num - 1 around the origin into panel [width, kPanel * lanes]; spare lanes of the last register are zero.
template <class T>
void pack_vectors(const Problem<T>& p, const T* origin, int64_t first, int num, T* panel) {
    constexpr int R = kPanel * kLanes<T>;
    const int used = (num + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    for (int r = 0; r < used; ++r) {
        const T* from = r < num ? p.vector(first + r) : origin;
        for (int64_t k = 0; k < p.width; ++k) panel[k * R + r] = from[k] - origin[k];
    }
}

template <class T>
void choose_by_floats(const Problem<T>& p, const Centred<T>& c, int64_t first, int num, Scratch<T>& scratch) {
    using V = Vec<T>;
    constexpr int L = kLanes<T>, R = kPanel * L;
    const int registers = (num + L - 1) / L;
    T* panel = scratch.panel.get();
    pack_vectors(p, c.origin.data(), first, num, panel);
    alignas(64) T squares[R], best[R], second[R];
    alignas(64) Int<T> tile[R];
    for (int i = 0; i < registers; ++i) {
        V sum{};
        for (int64_t k = 0; k < p.width; ++k) sum += load<V>(panel + k * R + i * L) * load<V>(panel + k * R + i * L);
        store(squares + i * L, sum);
    }
    race<Floats<T>>(registers, panel, p.width, c.packed.codes.get(), c.packed.start.get(), c.packed.tiles, best, second, tile);
    // Centring, products and their sum, half norm, and the comparison each err by a share of (width + 8) units of rounding, or underflow.
    const T unit = T(p.width + 8) * std::numeric_limits<T>::epsilon(), least = T(p.width + 8) * std::numeric_limits<T>::min();
    for (int r = 0; r < num; ++r) {
        const T length = std::sqrt(squares[r]), reach = length + c.radius;
        const T bound = best[r] - (unit * (length + T(0.5) * c.radius) * c.radius + least);
        const bool certain = second[r] < bound && reach * reach < std::numeric_limits<T>::max() / 4;
        const int64_t at = tile[r];
        p.index[first + r] = !certain ? kDoubt
                                      : choose(p, first + r, at,
                                               tile_scores<Floats<T>>(panel + r, p.width, c.packed.codes.get() + at * p.width * kTile,
                                                                      c.packed.start.get() + at * kTile),
                                               bound);
    }
}

// ----------------------------------------------------------------------------------------------------------------------- whole calls

template <class T>
void find_nearest(const Problem<T>& p, int threads) {
    constexpr int L = kLanes<T>, R = kPanel * L;
    const double work = double(p.num) * p.size * p.width;
    std::vector<int64_t> doubtful;
    std::vector<Scratch<T>> scratch;
    threads = threads_for(threads, work);
    for (int i = 0; i < threads; ++i) scratch.emplace_back(p.width);
    if (p.num <= 2 * L) {
        for (int64_t i = 0; i < p.num; ++i) doubtful.push_back(i);
    } else {
        const Centred<T> centred(p, threads);
        in_parallel(threads, (p.num + R - 1) / R, [&](int worker, int64_t i) {
            choose_by_floats(p, centred, i * R, int(std::min<int64_t>(R, p.num - i * R)), scratch[worker]);
        });
        for (int64_t i = 0; i < p.num; ++i)
            if (p.index[i] == kDoubt) doubtful.push_back(i);
    }
    const int64_t num = int64_t(doubtful.size());
    in_parallel(threads_for(threads, double(num) * p.size * p.width), (num + L - 1) / L, [&](int worker, int64_t i) {
        settle(p, doubtful.data() + i * L, int(std::min<int64_t>(L, num - i * L)), scratch[worker].panel.get());
    });
}

template <class T>
int nearest(const T* x, const T* codes, int64_t groups, int64_t num, int64_t size, int64_t width, int64_t x_group, int64_t x_stride,
            int64_t codes_group, int threads, int64_t* index) {
    try {
        for (int64_t g = 0; g < groups; ++g)
            find_nearest(Problem<T>{x + g * x_group, codes + g * codes_group, num, size, width, x_stride, index + g * num}, threads);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace

extern "C" {

int vqkit_nearest_float(const float* x, const float* codes, int64_t groups, int64_t num, int64_t size, int64_t width, int64_t x_group,
                        int64_t x_stride, int64_t codes_group, int threads, int64_t* index) {
    return nearest(x, codes, groups, num, size, width, x_group, x_stride, codes_group, threads, index);
}

int vqkit_nearest_double(const double* x, const double* codes, int64_t groups, int64_t num, int64_t size, int64_t width,
                         int64_t x_group, int64_t x_stride, int64_t codes_group, int threads, int64_t* index) {
    return nearest(x, codes, groups, num, size, width, x_group, x_stride, codes_group, threads, index);
}
}
