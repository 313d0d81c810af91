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
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#include <immintrin.h>
#endif
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define VQKIT_HAS_SHUFFLEVECTOR 1
#endif
#endif

#if defined(__linux__)
extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) __attribute__((weak));  // null where none is loaded
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
constexpr int64_t kMinWork = int64_t(1) << 24;  // products that pay for one more thread

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

// Of each two rows h apart, the blocks of h lanes on the off diagonal change places.
template <int h, class V, int... lane>
inline void swap_blocks(V& a, V& b, std::integer_sequence<int, lane...>) {
    constexpr int L = sizeof...(lane);
#if VQKIT_HAS_SHUFFLEVECTOR
    const V upper = __builtin_shufflevector(a, b, (lane & h ? L + lane - h : lane)...);
    b = __builtin_shufflevector(a, b, (lane & h ? L + lane : lane + h)...);
#else
    using I = Vec<Int<std::decay_t<decltype(a[0])>>>;
    const V upper = __builtin_shuffle(a, b, I{(lane & h ? L + lane - h : lane)...});
    b = __builtin_shuffle(a, b, I{(lane & h ? L + lane : lane + h)...});
#endif
    a = upper;
}

template <int h, class V, int L>
inline void transpose(V (&row)[L]) {
    if constexpr (h > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i)
            if ((i & h) == 0) swap_blocks<h>(row[i], row[i + h], std::make_integer_sequence<int, L>());
        transpose<h / 2>(row);
    }
}

// Rows of `width` values, one a lane, minus `origin` unless that is null, to to[k * stride + lane].
template <class T>
void across_lanes(const T* const* row, const T* origin, int64_t width, T* to, int64_t stride) {
    using V = Vec<T>;
    constexpr int L = kLanes<T>;
    int64_t k = 0;
    for (; k + L <= width; k += L) {
        const V centre = origin ? load<V>(origin + k) : V{};
        V block[L];
#pragma GCC unroll 16
        for (int r = 0; r < L; ++r) block[r] = load<V>(row[r] + k) - centre;
        transpose<L / 2>(block);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store(to + (k + i) * stride, block[i]);
    }
    for (; k < width; ++k)
        for (int r = 0; r < L; ++r) to[k * stride + r] = row[r][k] - (origin ? origin[k] : T(0));
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

struct Crew {
    int size;     // threads that a call may take
    bool pooled;  // whether from the pool of the OpenMP that torch has loaded; its threads, waiting for work, may keep others from running

    Crew for_work(double products) const { return {int(std::max(1.0, std::min(double(size), products / kMinWork))), pooled}; }

    template <class Work>
    void run(const Work& work) const {
#if defined(__linux__)
        if (pooled && size > 1 && GOMP_parallel) {
            GOMP_parallel([](void* data) { (*static_cast<const Work*>(data))(); }, const_cast<Work*>(&work), unsigned(size), 0);
            return;
        }
#endif
        std::vector<std::thread> others;
        others.reserve(size);
        try {
            for (int i = 1; i < size; ++i) others.emplace_back(std::cref(work));
        } catch (const std::system_error&) {  // no more threads to be had: those that there are do the work
        }
        work();
        for (auto& other : others) other.join();
    }
};

// task(worker, i) for each i < count, worker < crew.size; what a task throws is thrown. Nothing outlives the call but the pool.
template <class Task>
void in_parallel(Crew crew, int64_t count, const Task& task) {
    crew.size = int(std::max<int64_t>(1, std::min<int64_t>(crew.size, count)));
    std::atomic<int64_t> next{0};
    std::atomic<int> workers{0};
    std::vector<std::exception_ptr> thrown(crew.size);
    crew.run([&] {
        const int worker = workers++;
        try {
            for (int64_t i = next++; i < count; i = next++) task(worker, i);
        } catch (...) {
            thrown[worker] = std::current_exception();
            next = count;
        }
    });
    for (auto& exception : thrown)
        if (exception) std::rethrow_exception(exception);
}

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
T squared_distance(const T* a, const T* b, int64_t width) {
    using V = Vec<T>;
    constexpr int L = kLanes<T>;
    V sums{};
    T rest = 0;
    int64_t k = 0;
    for (; k + L <= width; k += L) {
        const V difference = load<V>(a + k) - load<V>(b + k);
        sums = sums + difference * difference;
    }
    for (; k < width; ++k) rest += (a[k] - b[k]) * (a[k] - b[k]);
    for (int i = 0; i < L; ++i) rest += sums[i];
    return rest;
}

// The nearest code of each vector row[0 ... num - 1] by explicit differences to all codes; at most as many as there are lanes.
template <class T>
void settle(const Problem<T>& p, const int64_t* row, int num, T* scratch) {
    using V = Vec<T>;
    using I = Vec<Int<T>>;
    constexpr int L = kLanes<T>;
    const T* from[L];
    for (int r = 0; r < L; ++r) from[r] = p.vector(row[std::min(r, num - 1)]);
    across_lanes<T>(from, nullptr, p.width, scratch, L);
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
int64_t pick(const Problem<T>& p, int64_t row, int64_t tile, V score, M least) {
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
    S* tile(int64_t t) const { return codes.get() + t * steps * kTile; }
};

// The largest score of each tile for each lane of a panel, [tiles, kPanel registers], and the `few` largest of these, falling,
// [few, kPanel registers]: the codes of that many scores lie in those tiles.
template <class P, int registers>
void top_tiles(const typename P::Step* panel, int64_t steps, const typename P::Step* codes, const typename P::Step* start, int64_t tiles,
               int64_t few, typename P::Step* tops, typename P::Step* largest) {
    using S = typename P::Step;
    using V = Vec<S>;
    constexpr int L = kLanes<S>;
    constexpr S lowest = std::is_integral<S>::value ? std::numeric_limits<S>::min() : -std::numeric_limits<S>::infinity();
    std::fill_n(largest, few * kPanel * L, lowest);
    for (int64_t tile = 0; tile < tiles; ++tile, start += kTile, tops += kPanel * L) {
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
        V top[registers];
#pragma GCC unroll 4
        for (int i = 0; i < registers; ++i) {
            top[i] = score[i][0];
#pragma GCC unroll 8
            for (int j = 1; j < kTile; ++j) top[i] = larger(score[i][j], top[i]);
            store(tops + i * L, top[i]);
        }
        for (int64_t place = 0; place < few; ++place)
#pragma GCC unroll 4
            for (int i = 0; i < registers; ++i) {
                S* at = largest + (place * kPanel + i) * L;
                const V held = load<V>(at);
                store(at, larger(top[i], held));
                top[i] = smaller(top[i], held);
            }
    }
}

template <class P>
void top_tiles(int registers, const typename P::Step* panel, int64_t steps, const typename P::Step* codes, const typename P::Step* start,
               int64_t tiles, int64_t few, typename P::Step* tops, typename P::Step* largest) {
    if (registers == 1) top_tiles<P, 1>(panel, steps, codes, start, tiles, few, tops, largest);
    else if (registers == 2 || kPanel == 2) top_tiles<P, 2>(panel, steps, codes, start, tiles, few, tops, largest);
    else top_tiles<P, kPanel>(panel, steps, codes, start, tiles, few, tops, largest);
}

// The codes of lane r whose score is at least `least`, to `found`; how many. `tops` as top_tiles leaves it.
template <class P, class M>
int64_t codes_from(const typename P::Step* panel, int64_t steps, const Packed<typename P::Step>& packed, const typename P::Step* start, int r,
                   M least, const typename P::Step* tops, int64_t size, int64_t* found) {
    using S = typename P::Step;
    int64_t num = 0;
    for (int64_t tile = 0; tile < packed.tiles; ++tile) {
        if (!(M(tops[tile * kPanel * kLanes<S> + r]) >= least)) continue;
        const auto score = tile_scores<P>(panel + r, steps, packed.tile(tile), start + tile * kTile);
        for (int j = 0; j < kTile; ++j)
            if (tile * kTile + j < size && M(score[j]) >= least) found[num++] = tile * kTile + j;
    }
    return num;
}

template <class Task>
void for_tiles(Crew crew, int64_t tiles, int64_t width, const Task& task) {
    const int64_t at_once = std::max<int64_t>(1, 32768 / (kTile * (width + 1)));
    in_parallel(crew.for_work(16.0 * kTile * tiles * width), (tiles + at_once - 1) / at_once, [&](int, int64_t i) {
        for (int64_t t = i * at_once; t < std::min(tiles, (i + 1) * at_once); ++t) task(t);
    });
}

// The codes around a point amid them, and how far they reach.
template <class T>
struct Centre {
    std::vector<T> origin;
    std::vector<double> half_norm;  // [tiles * kTile]
    T radius;                       // at least the largest length of a code around the origin; not finite if that is not

    Centre(const Problem<T>& p, Crew crew) : origin(p.width), half_norm((p.size + kTile - 1) / kTile * kTile) {
        std::vector<double> sum(p.width);
        const int64_t step = (p.size + 255) / 256;  // some of the codes are enough: any point amid them will do
        int64_t used = 0;
        for (int64_t c = 0; c < p.size; c += step, ++used)
            for (int64_t k = 0; k < p.width; ++k) sum[k] += p.code(c)[k];
        for (int64_t k = 0; k < p.width; ++k) origin[k] = T(sum[k] / double(used));
        for_tiles(crew, int64_t(half_norm.size()) / kTile, p.width, [&](int64_t tile) {
            for (int64_t c = tile * kTile; c < std::min(p.size, (tile + 1) * kTile); ++c) half_norm[c] = 0.5 * squares(p.code(c), p.width);
        });
        double most = 0;
        for (double half : half_norm) most = half <= most || most != most ? most : half;
        radius = T(std::sqrt(2 * most) * (1 + 4 * std::numeric_limits<T>::epsilon()));
    }

    double squares(const T* code, int64_t width) const {
        using V = Vec<double>;
        constexpr int L = kLanes<double>;
        V sum{};
        double rest = 0;
        int64_t k = 0;
        for (; k + L <= width; k += L) {
            const V value = __builtin_convertvector(load<Vec<T, L * int(sizeof(T))>>(code + k) - load<Vec<T, L * int(sizeof(T))>>(&origin[k]), V);
            sum = sum + value * value;
        }
        for (; k < width; ++k) rest += double(code[k] - origin[k]) * double(code[k] - origin[k]);
        for (int i = 0; i < L; ++i) rest += sum[i];
        return rest;
    }
};

// ------------------------------------------------------------------------------------------------------------------ panels of vectors

// Vectors around the origin, across the lanes: values [width, kPanel * lanes].
template <class T>
struct Panel {
    static constexpr int L = kLanes<T>, R = kPanel * L;
    Buffer<T> values;
    alignas(64) T length[R], most[R];  // of each vector; the largest magnitude of its components
    int num = 0, registers = 0;
    explicit Panel(int64_t width) : values(size_t(width) * R) {}

    void pack(const Problem<T>& p, const Centre<T>& centre, int64_t first, int count) {
        num = count, registers = (count + L - 1) / L;
        const T* origin = centre.origin.data();
        for (int i = 0; i < registers; ++i) {
            const T* from[L];
            for (int r = 0; r < L; ++r) from[r] = i * L + r < num ? p.vector(first + i * L + r) : origin;  // spare lanes are zero
            across_lanes<T>(from, origin, p.width, values.get() + i * L, R);
            Vec<T> sum{}, top{};
            for (int64_t k = 0; k < p.width; ++k) {
                const Vec<T> value = load<Vec<T>>(values.get() + k * R + i * L);
                sum = sum + value * value;
                top = larger(larger(value, -value), top);
            }
            store(length + i * L, sum);
            store(most + i * L, top);
        }
        for (int r = 0; r < registers * L; ++r) length[r] = std::sqrt(length[r]);
    }
};

// Whether the squared distance of a vector to any code is finite beyond doubt.
template <class T>
bool within_range(T length, T radius) {
    return (length + radius) * (length + radius) < std::numeric_limits<T>::max() / 4;
}

template <class S>
struct Ranking {
    static constexpr int R = kPanel * kLanes<S>;
    alignas(64) S best[R], second[R];
    alignas(64) Int<S> tile[R];
};

// ---------------------------------------------------------------------------------------------------------------------------- by floats

template <class T>
struct ByFloats {
    const Centre<T>& centre;
    Packed<T> packed;

    ByFloats(const Problem<T>& p, const Centre<T>& centre, Crew crew) : centre(centre), packed(p.width, p.size) {
        for_tiles(crew, packed.tiles, p.width, [&](int64_t tile) {
            T* to = packed.tile(tile);
            for (int j = 0; j < kTile; ++j) {
                const int64_t c = tile * kTile + j;
                for (int64_t k = 0; k < p.width; ++k) to[k * kTile + j] = c < p.size ? p.code(c)[k] - centre.origin[k] : T(0);
                packed.start[c] = c < p.size ? T(-centre.half_norm[c]) : -std::numeric_limits<T>::infinity();
            }
        });
    }

    // The index of each vector of the panel, from `first` on, or kDoubt.
    void choose(const Problem<T>& p, const Panel<T>& panel, int64_t first) const {
        Ranking<T> race_of;
        race<Floats<T>>(panel.registers, panel.values.get(), packed.steps, packed.codes.get(), packed.start.get(), packed.tiles,
                        race_of.best, race_of.second, race_of.tile);
        // Centring, products with their sum, half norm and comparison each err by their share of (width + 8) units, or by underflow.
        const T unit = T(p.width + 8) * std::numeric_limits<T>::epsilon(), least = T(p.width + 8) * std::numeric_limits<T>::min();
        for (int r = 0; r < panel.num; ++r) {
            const T error = unit * (panel.length[r] + T(0.5) * centre.radius) * centre.radius + least;
            const T bound = race_of.best[r] - error;
            const int64_t tile = race_of.tile[r];
            p.index[first + r] = kDoubt;
            if (!(race_of.second[r] < bound) || !within_range(panel.length[r], centre.radius)) continue;
            const auto score = tile_scores<Floats<T>>(panel.values.get() + r, packed.steps, packed.tile(tile), &packed.start[tile * kTile]);
            p.index[first + r] = pick(p, first + r, tile, score, bound);
        }
    }

    // found(r, codes, how many) for each vector of the panel: codes among which are its `few` nearest, or null where scores do not tell.
    template <class Found>
    void choose_few(const Problem<T>& p, const Panel<T>& panel, int64_t few, T* tops, T* largest, int64_t* codes, const Found& found) const {
        constexpr int R = Panel<T>::R;
        top_tiles<Floats<T>>(panel.registers, panel.values.get(), packed.steps, packed.codes.get(), packed.start.get(), packed.tiles, few,
                             tops, largest);
        const T unit = T(p.width + 8) * std::numeric_limits<T>::epsilon(), least = T(p.width + 8) * std::numeric_limits<T>::min();
        for (int r = 0; r < panel.num; ++r) {
            const T error = unit * (panel.length[r] + T(0.5) * centre.radius) * centre.radius + least;
            if (!within_range(panel.length[r], centre.radius)) {
                found(r, static_cast<const int64_t*>(nullptr), p.size);
                continue;
            }
            const T bound = largest[(few - 1) * R + r] - error;
            const int64_t num = codes_from<Floats<T>>(panel.values.get(), packed.steps, packed, packed.start.get(), r, bound, tops, p.size, codes);
            found(r, static_cast<const int64_t*>(codes), num);
        }
    }
};

// --------------------------------------------------------------------------------------------------------------- by pairs of integers

#if VQKIT_PAIRS
constexpr float kRange = 32767;
constexpr double kSums = 0.95 * 2147483648.0;

template <class V>
inline V rounded(V value) {  // to the nearest integer, |value| < 2^22
    constexpr float shift = 12582912;
    return (value + shift) - shift;
}

// A panel and codes in 16 bits. Of a score times `scale` the sum of integers errs by what rounding took from vector and code:
// |x c - x' c'| <= |x - x'| |c| + |x'| |c - c'|.
struct ByPairs {
    struct Scratch {
        Buffer<int32_t> values, start;  // [steps, R], [tiles * kTile]
        double scale = 0;               // what `start` was made for
        Scratch(int64_t width, int64_t size)
            : values(size_t(width + 1) / 2 * Panel<float>::R), start(size_t(size + kTile - 1) / kTile * kTile) {}
    };

    const Centre<float>& centre;
    Packed<int32_t> packed;
    float code_scale, lost;  // by how much codes were scaled; the largest length that rounding took from a scaled code

    // Whether scales and squares stay within the range of floats, and the gain within reach.
    static bool suits(const Problem<float>& p, const Centre<float>& centre) {
        return p.width >= 8 && p.width <= 65536 && centre.radius > 1e-15f && centre.radius < 1e15f;
    }

    ByPairs(const Problem<float>& p, const Centre<float>& centre, Crew crew)
        : centre(centre), packed((p.width + 1) / 2, p.size), code_scale(kRange / centre.radius) {
        std::vector<float> most(packed.tiles);
        for_tiles(crew, packed.tiles, p.width, [&](int64_t tile) {
            std::vector<int32_t> row(packed.steps);
            for (int j = 0; j < kTile && tile * kTile + j < p.size; ++j) {
                most[tile] = std::max(most[tile], round(p, p.code(tile * kTile + j), reinterpret_cast<char*>(row.data())));
                for (int64_t s = 0; s < packed.steps; ++s) packed.tile(tile)[s * kTile + j] = row[s];
            }
            for (int64_t c = p.size; c < (tile + 1) * kTile; ++c)
                for (int64_t s = 0; s < packed.steps; ++s) packed.tile(tile)[s * kTile + c % kTile] = 0;
        });
        lost = std::sqrt(*std::max_element(most.begin(), most.end()));
    }

    // A code in 16 bits to `to`; returns the square of what rounding took from it.
    float round(const Problem<float>& p, const float* code, char* to) const {
        using V = Vec<float>;
        constexpr int L = kLanes<float>;
        const float* origin = centre.origin.data();
        V squares{};
        float rest = 0;
        int64_t k = 0;
        for (; k + L <= p.width; k += L) {
            const V value = (load<V>(code + k) - load<V>(origin + k)) * code_scale, whole = rounded(value);
            squares = squares + (value - whole) * (value - whole);
            const auto narrow = __builtin_convertvector(__builtin_convertvector(whole, Vec<int32_t>), Vec<int16_t, kBytes / 2>);
            std::memcpy(to + 2 * k, &narrow, sizeof narrow);
        }
        for (; k < p.width; ++k) {
            const float value = (code[k] - origin[k]) * code_scale, whole = rounded(value);
            rest += (value - whole) * (value - whole);
            const int16_t narrow = int16_t(whole);
            std::memcpy(to + 2 * k, &narrow, sizeof narrow);
        }
        for (int i = 0; i < L; ++i) rest += squares[i];
        return rest;
    }

    // As ByFloats::choose; returns how many are in doubt.
    int choose(const Problem<float>& p, const Panel<float>& panel, int64_t first, Scratch& scratch) const {
        const float scale = fit(p, panel, scratch);
        alignas(64) float taken[Panel<float>::R];
        pack(p, panel, scale, scratch, taken);
        Ranking<int32_t> race_of;
        race<Pairs>(panel.registers, scratch.values.get(), packed.steps, packed.codes.get(), scratch.start.get(), packed.tiles,
                    race_of.best, race_of.second, race_of.tile);
        int doubtful = 0;
        for (int r = 0; r < panel.num; ++r) {
            const double bound = race_of.best[r] - error(p, panel, scale, taken[r], r);
            const int64_t tile = race_of.tile[r];
            p.index[first + r] = kDoubt;
            if (!(race_of.second[r] < bound) || !within_range(panel.length[r], centre.radius)) {
                ++doubtful;
                continue;
            }
            const auto score = tile_scores<Pairs>(scratch.values.get() + r, packed.steps, packed.tile(tile), &scratch.start[tile * kTile]);
            p.index[first + r] = pick(p, first + r, tile, score, bound);
        }
        return doubtful;
    }

    // Two scores of vector r of the panel further apart than this are in their true order.
    double error(const Problem<float>& p, const Panel<float>& panel, float scale, float taken, int r) const {
        const double radius = double(code_scale) * centre.radius, slack = 1.001 + p.width * 1e-6;
        const double length = double(scale) * panel.length[r];
        const double by_rounding = taken * radius + (length + taken) * lost;
        const double by_floats = 8 * std::numeric_limits<float>::epsilon() * (length + double(scale) * centre.radius) * radius;
        return 2 * slack * (by_rounding + by_floats) + 2;
    }

    // As ByFloats::choose_few.
    template <class Found>
    void choose_few(const Problem<float>& p, const Panel<float>& panel, Scratch& scratch, int64_t few, int32_t* tops, int32_t* largest,
                    int64_t* codes, const Found& found) const {
        constexpr int R = Panel<float>::R;
        const float scale = fit(p, panel, scratch);
        alignas(64) float taken[R];
        pack(p, panel, scale, scratch, taken);
        top_tiles<Pairs>(panel.registers, scratch.values.get(), packed.steps, packed.codes.get(), scratch.start.get(), packed.tiles, few, tops,
                         largest);
        for (int r = 0; r < panel.num; ++r) {
            if (!within_range(panel.length[r], centre.radius)) {
                found(r, static_cast<const int64_t*>(nullptr), p.size);
                continue;
            }
            const double bound = largest[(few - 1) * R + r] - error(p, panel, scale, taken[r], r);
            const int64_t num = codes_from<Pairs>(scratch.values.get(), packed.steps, packed, scratch.start.get(), r, bound, tops, p.size, codes);
            found(r, static_cast<const int64_t*>(codes), num);
        }
    }

    // The scale of the vectors for which all components and all sums fit, in steps, so that most panels share one.
    float fit(const Problem<float>& p, const Panel<float>& panel, Scratch& scratch) const {
        float length = 0, most = 0;
        for (int r = 0; r < panel.num; ++r)
            if (within_range(panel.length[r], centre.radius)) length = std::max(length, panel.length[r]), most = std::max(most, panel.most[r]);
        const double reach = (double(length) + 0.5 * centre.radius) * centre.radius * code_scale;
        const double limit = std::min(kSums / reach, kRange / std::max(double(most), 1e-30));
        const float scale = float(std::exp2(std::floor(std::log2(limit) * 8) / 8));
        if (scratch.scale != scale) {
            scratch.scale = scale;
            const double both = double(scale) * double(code_scale);
            for (int64_t c = 0; c < p.size; ++c) scratch.start[c] = int32_t(-both * centre.half_norm[c] - 0.5);
            for (int64_t c = p.size; c < packed.tiles * kTile; ++c) scratch.start[c] = std::numeric_limits<int32_t>::min();
        }
        return scale;
    }

    // The panel in pairs, and the length of what rounding took from each scaled vector.
    void pack(const Problem<float>& p, const Panel<float>& panel, float scale, Scratch& scratch, float* taken) const {
        constexpr int L = Panel<float>::L, R = Panel<float>::R;
        using V = Vec<float>;
        using I = Vec<int32_t>;
        for (int i = 0; i < panel.registers; ++i) {
            V squares{};
            for (int64_t s = 0; s < packed.steps; ++s) {
                I whole[2] = {};
                for (int half = 0; half < 2 && 2 * s + half < p.width; ++half) {
                    const V value = load<V>(panel.values.get() + (2 * s + half) * R + i * L) * scale;
                    const V nearest = rounded(value);
                    squares = squares + (value - nearest) * (value - nearest);
                    whole[half] = __builtin_convertvector(nearest, I);
                }
                store(scratch.values.get() + s * R + i * L, (whole[0] & 0xffff) | (whole[1] << 16));
            }
            store(taken + i * L, squares);
        }
        for (int r = 0; r < panel.num; ++r) taken[r] = std::sqrt(taken[r]);
    }
};
#endif

// ------------------------------------------------------------------------------------------------------------------------- whole calls

// What a worker needs for itself.
template <class T>
struct Desk {
    Panel<T> panel;
#if VQKIT_PAIRS
    ByPairs::Scratch pairs;
#endif
    explicit Desk(const Problem<T>& p)
        : panel(p.width)
#if VQKIT_PAIRS
          ,
          pairs(p.width, p.size)
#endif
    {
    }
};

// Chooses for all vectors, panel by panel; kDoubt where scores do not tell.
template <class T>
void race_all(const Problem<T>& p, Crew crew, const std::vector<std::unique_ptr<Desk<T>>>& desks) {
    constexpr int R = Panel<T>::R;
    const Centre<T> centre(p, crew);
    const int64_t panels = (p.num + R - 1) / R;
    auto pack = [&](int worker, int64_t i) -> const Panel<T>& {
        desks[worker]->panel.pack(p, centre, i * R, int(std::min<int64_t>(R, p.num - i * R)));
        return desks[worker]->panel;
    };
#if VQKIT_PAIRS
    if constexpr (std::is_same<T, float>::value) {
        if (ByPairs::suits(p, centre)) {
            const ByPairs by_pairs(p, centre, crew);
            std::unique_ptr<ByFloats<T>> by_floats;  // made when a panel is as much in doubt that explicit differences would be slower
            std::once_flag once;
            in_parallel(crew, panels, [&](int worker, int64_t i) {
                const Panel<T>& panel = pack(worker, i);
                if (2 * by_pairs.choose(p, panel, i * R, desks[worker]->pairs) <= panel.num) return;
                std::call_once(once, [&] { by_floats = std::make_unique<ByFloats<T>>(p, centre, Crew{1, false}); });
                by_floats->choose(p, panel, i * R);
            });
            return;
        }
    }
#endif
    const ByFloats<T> by_floats(p, centre, crew);
    in_parallel(crew, panels, [&](int worker, int64_t i) { by_floats.choose(p, pack(worker, i), i * R); });
}

template <class T>
void find_nearest(const Problem<T>& p, Crew crew) {
    constexpr int L = Panel<T>::L;
    std::vector<int64_t> doubtful;
    crew = crew.for_work(double(p.num) * p.size * p.width);
    std::vector<std::unique_ptr<Desk<T>>> desks;
    for (int i = 0; i < crew.size; ++i) desks.push_back(std::make_unique<Desk<T>>(p));
    if (p.num <= 2 * L) {
        for (int64_t i = 0; i < p.num; ++i) doubtful.push_back(i);
    } else {
        race_all(p, crew, desks);
        for (int64_t i = 0; i < p.num; ++i)
            if (p.index[i] == kDoubt) doubtful.push_back(i);
    }
    const int64_t num = int64_t(doubtful.size());
    in_parallel(crew.for_work(double(num) * p.size * p.width), (num + L - 1) / L, [&](int worker, int64_t i) {
        settle(p, doubtful.data() + i * L, int(std::min<int64_t>(L, num - i * L)), desks[worker]->panel.values.get());
    });
}

// The `few` nearest codes of each vector, nearest first, of equals the lower one first: by explicit differences to those whose scores
// could mean them. The few-th largest score of a tile bounds the few-th largest score from below.
template <class T>
void find_few(const Problem<T>& p, Crew crew, int64_t few, T* distance) {
    constexpr int R = Panel<T>::R;
    crew = crew.for_work(double(p.num) * p.size * p.width);
    std::vector<std::unique_ptr<Desk<T>>> desks;
    for (int i = 0; i < crew.size; ++i) desks.push_back(std::make_unique<Desk<T>>(p));
    const Centre<T> centre(p, crew);
    const int64_t panels = (p.num + R - 1) / R, tiles = (p.size + kTile - 1) / kTile;
    struct Few {
        std::vector<std::pair<T, int64_t>> ranked;
        std::vector<int64_t> codes;
        Buffer<T> tops, largest;  // or integers of this size
        Few(int64_t size, int64_t tiles, int64_t few) : codes(size), tops(size_t(tiles) * R), largest(size_t(few) * R) { ranked.reserve(size); }
    };
    std::vector<std::unique_ptr<Few>> scratch;
    for (int i = 0; i < crew.size; ++i) scratch.push_back(std::make_unique<Few>(p.size, tiles, few));
    auto rank = [&](int worker, int64_t row, const int64_t* codes, int64_t num) {
        auto& ranked = scratch[worker]->ranked;
        ranked.clear();
        for (int64_t i = 0; i < num; ++i) {
            const int64_t code = codes ? codes[i] : i;
            const T far = squared_distance(p.vector(row), p.code(code), p.width);
            ranked.emplace_back(far == far ? far : std::numeric_limits<T>::infinity(), code);  // without NaN there is an order
        }
        std::partial_sort(ranked.begin(), ranked.begin() + few, ranked.end());
        for (int64_t i = 0; i < few; ++i) {
            const bool known = ranked[i].first < std::numeric_limits<T>::infinity();
            p.index[row * few + i] = known ? ranked[i].second : -1;
            distance[row * few + i] = known ? ranked[i].first : T(0);
        }
    };
    auto for_panels = [&](const auto& choose) {
        in_parallel(crew, panels, [&](int worker, int64_t i) {
            Panel<T>& panel = desks[worker]->panel;
            panel.pack(p, centre, i * R, int(std::min<int64_t>(R, p.num - i * R)));
            choose(worker, panel, [&](int r, const int64_t* codes, int64_t num) { rank(worker, i * R + r, codes, num); });
        });
    };
#if VQKIT_PAIRS
    if constexpr (std::is_same<T, float>::value) {
        if (ByPairs::suits(p, centre)) {
            const ByPairs by_pairs(p, centre, crew);
            for_panels([&](int worker, const Panel<T>& panel, const auto& found) {
                Few& own = *scratch[worker];
                by_pairs.choose_few(p, panel, desks[worker]->pairs, few, reinterpret_cast<int32_t*>(own.tops.get()),
                                    reinterpret_cast<int32_t*>(own.largest.get()), own.codes.data(), found);
            });
            return;
        }
    }
#endif
    const ByFloats<T> by_floats(p, centre, crew);
    for_panels([&](int worker, const Panel<T>& panel, const auto& found) {
        Few& own = *scratch[worker];
        by_floats.choose_few(p, panel, few, own.tops.get(), own.largest.get(), own.codes.data(), found);
    });
}

// ------------------------------------------------------------------------------------------------------------------ after the choice

// One pass over the vectors in the order of their codes, so that a code and its sums stay at hand.
template <class T>
struct Gathering {
    const T *x, *codes;
    const int64_t* index;
    int64_t num, size, width, x_stride;
    T* quantized;
    T *squared_error, *vectors, *lost;  // one number each
    T *count, *sum, *moments;           // null where not asked for; sum holds zeros

    static constexpr int64_t kRows = 512;  // of a task; sums of codes that span tasks are added in the order of tasks

    bool run(Crew crew) const {
        std::vector<int64_t> end(size + 1), order(num);
        for (int64_t i = 0; i < num; ++i) {
            if (index[i] < -1 || index[i] >= size) return false;
            if (index[i] >= 0) ++end[index[i] + 1];
        }
        if (count) std::copy_n(end.begin() + 1, size, count);
        for (int64_t c = 0; c < size; ++c) end[c + 1] += end[c];
        const int64_t chosen = end[size];
        int64_t without = chosen;
        for (int64_t i = 0; i < num; ++i) order[index[i] < 0 ? without++ : end[index[i]]++] = i;  // now end[c] is where code c ends
        const int64_t tasks = (chosen + kRows - 1) / kRows;
        Buffer<T> edges(2 * size_t(tasks) * width), squares(size_t(tasks) * width);
        in_parallel(crew.for_work(32.0 * num * width), tasks, [&](int, int64_t task) {
            const int64_t first = task * kRows, last = std::min(chosen, first + kRows);
            T* edge = &edges[2 * size_t(task) * width];
            std::fill_n(edge, 2 * width, T(0));
            std::fill_n(&squares[size_t(task) * width], width, T(0));
            for (int64_t at = first; at < last;) {
                const int64_t c = index[order[at]], stop = std::min(last, end[c]), start = c ? end[c - 1] : 0;
                const bool whole = sum && start >= first && end[c] <= last;
                T* total = whole ? sum + c * width : start < first ? edge : edge + width;
                for (; at < stop; ++at) {
                    if (at + 4 < last) __builtin_prefetch(x + order[at + 4] * x_stride);
                    take(order[at], c, total, &squares[size_t(task) * width]);
                }
            }
        });
        std::vector<double> errors(width);
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t first = task * kRows, last = std::min(chosen, first + kRows) - 1;
            const T* edge = &edges[2 * size_t(task) * width];
            if (sum) {
                add(index[order[first]], edge);
                add(index[order[last]], edge + width);
            }
            for (int64_t k = 0; k < width; ++k) errors[k] += squares[size_t(task) * width + k];
        }
        for (int64_t i = chosen; i < num; ++i) std::fill_n(quantized + order[i] * width, width, T(0));
        *squared_error = T(std::accumulate(errors.begin(), errors.end(), 0.0));
        *vectors = T(chosen), *lost = T(num - chosen);
        if (moments) spread(errors, double(std::max<int64_t>(chosen, 1)));
        return true;
    }

    void take(int64_t row, int64_t c, T* total, T* squares) const {
        using V = Vec<T>;
        constexpr int L = kLanes<T>;
        const T *from = x + row * x_stride, *code = codes + c * width;
        T* to = quantized + row * width;
        int64_t k = 0;
        for (; k + L <= width; k += L) {
            const V value = load<V>(from + k), chosen = load<V>(code + k), difference = value - chosen;
            store(to + k, chosen);
            store(squares + k, load<V>(squares + k) + difference * difference);
            store(total + k, load<V>(total + k) + value);
        }
        for (; k < width; ++k) {
            const T difference = from[k] - code[k];
            to[k] = code[k];
            squares[k] += difference * difference;
            total[k] += from[k];
        }
    }

    void add(int64_t c, const T* edge) const {
        for (int64_t k = 0; k < width; ++k) sum[c * width + k] += edge[k];
    }

    // Around the mean m: sum (x - m)^2 = sum (x - c)^2 + sum over codes of (c - m) (2 (sum_c - n_c c) + n_c (c - m)).
    void spread(const std::vector<double>& errors, double number) const {
        std::vector<double> total(width), squares(errors);
        for (int64_t c = 0; c < size; ++c)
            if (count[c] > 0)
                for (int64_t k = 0; k < width; ++k) total[k] += sum[c * width + k];
        for (int64_t c = 0; c < size; ++c) {
            if (count[c] == 0) continue;
            for (int64_t k = 0; k < width; ++k) {
                const double code = codes[c * width + k], around = code - total[k] / number, n = count[c];
                squares[k] += around * (2 * (sum[c * width + k] - n * code) + n * around);
            }
        }
        for (int64_t k = 0; k < width; ++k) {
            moments[k] = T(total[k]);
            moments[width + k] = T(squares[k] < 0 ? 0 : squares[k]);
        }
    }
};

// The gradient of the rotation trick, or of straight-through, and of `pull` * |x - code|^2 / 2 for each vector; see ops/estimators.py.
template <class T>
struct Rotation {
    const T *gradient, *x, *codes;  // no gradient: null
    const int64_t* index;
    int64_t width, gradient_stride, x_stride;
    T pull;
    bool turns;
    T* result;

    void row(int64_t i) const {
        const T* from = x + i * x_stride;
        T* to = result + i * width;
        if (index[i] < 0) {
            std::fill_n(to, width, T(0));
            return;
        }
        const T* code = codes + index[i] * width;
        if (!gradient) {
            for (int64_t k = 0; k < width; ++k) to[k] = pull * (from[k] - code[k]);
            return;
        }
        const T* g = gradient + i * gradient_stride;
        if (!turns) {
            for (int64_t k = 0; k < width; ++k) to[k] = g[k] + pull * (from[k] - code[k]);
            return;
        }
        const T of_x = length(from), of_code = length(code), shorter = std::min(of_x, of_code), longer = std::max(of_x, of_code);
        const T place = shorter < std::numeric_limits<T>::min() ? T(0) : std::min(T(1), T(100) * (shorter / longer));
        const T rotating = place * place * (3 - 2 * place);
        if (rotating == 0) {
            for (int64_t k = 0; k < width; ++k) to[k] = g[k] + pull * (from[k] - code[k]);
            return;
        }
        const T e = 1 / of_x, q = 1 / of_code;
        const auto [of_sum, g_e, g_q] = products(g, from, code, of_x, of_code);
        const T along_r = of_sum > 0 ? (g_e + g_q) / of_sum : T(0);  // g.r / |e + q|
        const T scale = rotating * std::min(of_code * e, T(10000));
        // scale (g - 2 (g.r) r + 2 (g.q) e) + (1 - rotating) g
        const T by_g = scale + 1 - rotating, by_x = 2 * scale * (g_q - along_r) * e, by_code = -2 * scale * along_r * q;
        for (int64_t k = 0; k < width; ++k) to[k] = by_g * g[k] + by_x * from[k] + by_code * code[k] + pull * (from[k] - code[k]);
    }

    // Without overflow or underflow of the squares where the plain way meets neither.
    T length(const T* v) const {
        T most = 0;
        const T plain = squares(v, T(1));
        if (plain > T(1e-25) && plain < T(1e25)) return std::sqrt(plain);
        for (int64_t k = 0; k < width; ++k) most = std::max(most, std::abs(v[k]));
        return most == 0 ? T(0) : std::sqrt(squares(v, 1 / most)) * most;
    }

    T squares(const T* v, T scale) const {
        return sum([&](auto at, int64_t k) {
            const auto value = at(v + k) * scale;
            return value * value;
        });
    }

    struct Products {
        T of_sum, g_e, g_q;  // |e + q|^2, g.e, g.q
    };

    Products products(const T* g, const T* from, const T* code, T of_x, T of_code) const {
        const T of_sum = sum([&](auto at, int64_t k) {
            const auto both = at(from + k) / of_x + at(code + k) / of_code;  // of opposite directions exactly zero
            return both * both;
        });
        return {of_sum,
                sum([&](auto at, int64_t k) { return at(g + k) * (at(from + k) / of_x); }),
                sum([&](auto at, int64_t k) { return at(g + k) * (at(code + k) / of_code); })};
    }

    // The sum over k of term(at, k), where at(pointer) is one value or a register of them.
    template <class Term>
    T sum(const Term& term) const {
        using V = Vec<T>;
        constexpr int L = kLanes<T>;
        V sums{};
        T rest = 0;
        int64_t k = 0;
        for (; k + L <= width; k += L) sums = sums + term([](const T* p) { return load<V>(p); }, k);
        for (; k < width; ++k) rest += term([](const T* p) { return *p; }, k);
        for (int i = 0; i < L; ++i) rest += sums[i];
        return rest;
    }
};

enum Result { kDone = 0, kNoMemory = 1, kBadIndex = 2 };

template <class T>
int nearest(const T* x, const T* codes, int64_t groups, int64_t num, int64_t size, int64_t width, int64_t x_group, int64_t x_stride,
            Crew crew, int64_t* index) {
    try {
        for (int64_t g = 0; g < groups; ++g)
            find_nearest(Problem<T>{x + g * x_group, codes + g * size * width, num, size, width, x_stride, index + g * num}, crew);
        return kDone;
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
}

template <class T>
int few_nearest(const T* x, const T* codes, int64_t groups, int64_t num, int64_t size, int64_t width, int64_t x_group, int64_t x_stride,
                Crew crew, int64_t few, int64_t* index, T* distance) {
    try {
        for (int64_t g = 0; g < groups; ++g)
            find_few(Problem<T>{x + g * x_group, codes + g * size * width, num, size, width, x_stride, index + g * num * few}, crew, few,
                     distance + g * num * few);
        return kDone;
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
}

template <class T>
int gather(const T* x, const T* codes, const int64_t* index, int64_t groups, int64_t num, int64_t size, int64_t width, int64_t x_group,
           int64_t x_stride, Crew crew, T* quantized, T* error, T* squared_error, T* vectors, T* lost, T* count, T* sum, T* moments) {
    try {
        double squares = 0, number = 0;
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t row = g * num, code = g * size;
            const Gathering<T> gathering{
                x + g * x_group, codes + code * width, index + row, num, size, width, x_stride, quantized + row * width, squared_error + g,
                vectors + g, lost + g, count ? count + code : nullptr, sum ? sum + code * width : nullptr,
                moments ? moments + 2 * g * width : nullptr};
            if (!gathering.run(crew)) return kBadIndex;
            squares += squared_error[g], number += vectors[g];
        }
        *error = T(squares / std::max(number * width, 1.0));
        return kDone;
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
}

template <class T>
int back(const T* gradient, const T* x, const T* codes, const int64_t* index, int64_t groups, int64_t num, int64_t size, int64_t width,
         int64_t gradient_group, int64_t gradient_stride, int64_t x_group, int64_t x_stride, double of_error, bool turns, Crew crew,
         T* result) {
    constexpr int64_t at_once = 256;
    int64_t number = 0;
    try {
        for (int64_t i = 0; i < groups * num; ++i) {
            if (index[i] < -1 || index[i] >= size) return kBadIndex;
            number += index[i] >= 0;
        }
        const T pull = T(2 * of_error / std::max(double(number) * width, 1.0));
        for (int64_t g = 0; g < groups; ++g) {
            const Rotation<T> rotation{gradient ? gradient + g * gradient_group : nullptr, x + g * x_group, codes + g * size * width,
                                       index + g * num, width, gradient_stride, x_stride, pull, turns, result + g * num * width};
            in_parallel(crew.for_work(32.0 * num * width), (num + at_once - 1) / at_once, [&](int, int64_t task) {
                for (int64_t i = task * at_once; i < std::min(num, (task + 1) * at_once); ++i) rotation.row(i);
            });
        }
        return kDone;
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
}

// The gradient of the codes, into zeros: that of each vector, `passed` times the output's and pull * (code - x), added up by code.
template <class T>
int learn(const T* gradient, const T* x, const T* codes, const int64_t* index, int64_t groups, int64_t num, int64_t size, int64_t width,
          int64_t gradient_group, int64_t gradient_stride, int64_t x_group, int64_t x_stride, double of_error, double passed, Crew crew,
          T* result) {
    constexpr int64_t at_once = 16;  // columns, so that vectors are added in their order, whatever the number of threads
    int64_t number = 0;
    try {
        for (int64_t i = 0; i < groups * num; ++i) {
            if (index[i] < -1 || index[i] >= size) return kBadIndex;
            number += index[i] >= 0;
        }
        const T pull = T(2 * of_error / std::max(double(number) * width, 1.0)), share = T(passed);
        const int64_t columns = (width + at_once - 1) / at_once;
        in_parallel(crew.for_work(4.0 * groups * num * width), groups * columns, [&](int, int64_t task) {
            const int64_t g = task / columns, first = task % columns * at_once, last = std::min(width, first + at_once);
            for (int64_t i = 0; i < num; ++i) {
                const int64_t c = index[g * num + i];
                if (c < 0) continue;
                const T *from = x + g * x_group + i * x_stride, *code = codes + (g * size + c) * width;
                const T* of_output = gradient ? gradient + g * gradient_group + i * gradient_stride : nullptr;
                T* to = result + (g * size + c) * width;
                for (int64_t k = first; k < last; ++k) to[k] += pull * (code[k] - from[k]);
                if (of_output)
                    for (int64_t k = first; k < last; ++k) to[k] += share * of_output[k];
            }
        });
        return kDone;
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
}

}  // namespace

#define VQKIT_FUNCTIONS(T)                                                                                                              \
    int vqkit_few_##T(const T* x, const T* codes, int64_t groups, int64_t num, int64_t size, int64_t width, int64_t x_group,            \
                      int64_t x_stride, int threads, int pooled, int64_t few, int64_t* index, T* distance) {                            \
        return few_nearest(x, codes, groups, num, size, width, x_group, x_stride, Crew{threads, pooled != 0}, few, index, distance);    \
    }                                                                                                                                   \
    int vqkit_nearest_##T(const T* x, const T* codes, int64_t groups, int64_t num, int64_t size, int64_t width, int64_t x_group,        \
                          int64_t x_stride, int threads, int pooled, int64_t* index) {                                                              \
        return nearest(x, codes, groups, num, size, width, x_group, x_stride, Crew{threads, pooled != 0}, index);                                          \
    }                                                                                                                                   \
    int vqkit_gather_##T(const T* x, const T* codes, const int64_t* index, int64_t groups, int64_t num, int64_t size, int64_t width,    \
                         int64_t x_group, int64_t x_stride, int threads, int pooled, T* quantized, T* error, T* squared_error,          \
                         T* vectors, T* lost, T* count, T* sum, T* moments) {                                                           \
        return gather(x, codes, index, groups, num, size, width, x_group, x_stride, Crew{threads, pooled != 0}, quantized, error,       \
                      squared_error, vectors, lost, count, sum, moments);                                                               \
    }                                                                                                                                   \
    int vqkit_back_##T(const T* gradient, const T* x, const T* codes, const int64_t* index, int64_t groups, int64_t num, int64_t size,  \
                       int64_t width, int64_t gradient_group, int64_t gradient_stride, int64_t x_group, int64_t x_stride,               \
                       double of_error, int turns, int threads, int pooled, T* result) {                                                \
        return back(gradient, x, codes, index, groups, num, size, width, gradient_group, gradient_stride, x_group, x_stride, of_error,  \
                    turns != 0, Crew{threads, pooled != 0}, result);                                                                    \
    }                                                                                                                                   \
    int vqkit_learn_##T(const T* gradient, const T* x, const T* codes, const int64_t* index, int64_t groups, int64_t num, int64_t size, \
                        int64_t width, int64_t gradient_group, int64_t gradient_stride, int64_t x_group, int64_t x_stride,              \
                        double of_error, double passed, int threads, int pooled, T* result) {                                           \
        return learn(gradient, x, codes, index, groups, num, size, width, gradient_group, gradient_stride, x_group, x_stride, of_error, \
                     passed, Crew{threads, pooled != 0}, result);                                                                       \
    }

extern "C" {
VQKIT_FUNCTIONS(float)
VQKIT_FUNCTIONS(double)
}
