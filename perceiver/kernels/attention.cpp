// softmax(scale q k^T + mask) v in tiles that stay in the caches, and its gradients with the scores computed again.
//
// Arrays are float32 (batch, head, row, channel) with any strides but the last, which is 1. Keys and values may be one
// array; so may their gradients, which then hold the sum of both. A task is one head of one item: it walks the keys in
// blocks, packs each block once for the products' inner loop, and holds the results of all its queries in its own room.

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "vector.h"

namespace {

constexpr int VECTORS = LANES == 16 ? 4 : 2, ROWS = 6, PANEL = VECTORS * LANES;  // of a tile held in registers
constexpr int64_t QUERY_BLOCK = 96;

inline int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

struct Array {
    float* data;
    int64_t batch, head, row;
    float* at(int64_t b, int64_t h, int64_t r) const { return data + b * batch + h * head + r * row; }
};

// One call. dk and dv have no data where the keys take no gradient, and one data where keys and values are one array.
struct Call {
    int64_t batch, heads, queries, keys, width, values, threads;
    float scale;
    Array q, k, v, out, slope, dq, dk, dv;
    const uint8_t* mask;
    float* lse;
    const float* delta;

    int64_t key_block() const { return std::max(width, values) <= 192 ? 256 : 128; }

    // What is added to the scores of a block of keys: 0, or NOTHING where there is no key.
    void presence(int64_t b, int64_t first, int64_t count, float* to) const {
        const uint8_t* there = mask ? mask + b * keys + first : nullptr;
        for (int64_t i = 0; i < whole(count); i++) to[i] = i < count && (!there || there[i]) ? 0.0f : NOTHING;
    }
};

struct Room {
    std::unique_ptr<float, void (*)(void*)> data{nullptr, std::free};
    int64_t size = 0;
    float* get(int64_t wanted) {
        if (wanted > size) data.reset((float*)std::aligned_alloc(64, (wanted * 4 + 63) / 64 * 64)), size = wanted;
        return data.get();
    }
};

// A matrix of depth x columns in panels of PANEL columns, each contiguous; zeros fill it to whole vectors.
struct Panels {
    Room room;
    float* data;
    int64_t depth, columns;

    void size(int64_t d, int64_t c) { depth = d, columns = whole(c), data = room.get(depth * columns); }

    void rows(const float* from, int64_t stride, int64_t d, int64_t c) {
        size(d, c);
        for (int64_t j = 0; j < columns; j += PANEL) {
            const int64_t wide = std::min<int64_t>(PANEL, columns - j), real = std::min(wide, c - j);
            for (int64_t r = 0; r < depth; r++) {
                float* to = data + j * depth + r * wide;
                std::memcpy(to, from + r * stride + j, real * sizeof(float));
                for (int64_t x = real; x < wide; x++) to[x] = 0;
            }
        }
    }

    void transposed(const float* from, int64_t stride, int64_t d, int64_t c) {
        size(d, c);
        for (int64_t j = 0; j < columns; j += LANES) {
            const int64_t panel = j / PANEL * PANEL, wide = std::min<int64_t>(PANEL, columns - panel);
            float* to = data + panel * depth + (j - panel);
            if (j + LANES <= c) {
                for (int64_t r = 0; r < depth; r++)
                    for (int64_t x = 0; x < LANES; x++) to[r * wide + x] = from[(j + x) * stride + r];
            } else {
                for (int64_t r = 0; r < depth; r++)
                    for (int64_t x = 0; x < LANES; x++) to[r * wide + x] = j + x < c ? from[(j + x) * stride + r] : 0;
            }
        }
    }
};

template <int R, int V>
inline void tile(const float* a, int64_t row, int64_t step, const float* b, int64_t depth, float* c, int64_t wide, bool add) {
    vec total[R][V];
    for (int i = 0; i < R; i++)
        for (int v = 0; v < V; v++) total[i][v] = add ? load(c + i * wide + v * LANES) : vec{};
    for (int64_t k = 0; k < depth; k++) {
        vec x[V];
        for (int v = 0; v < V; v++) x[v] = load(b + k * (V * LANES) + v * LANES);
        for (int i = 0; i < R; i++) {
            const vec y = splat(a[i * row + k * step]);
            for (int v = 0; v < V; v++) total[i][v] += y * x[v];
        }
    }
    for (int i = 0; i < R; i++)
        for (int v = 0; v < V; v++) store(c + i * wide + v * LANES, total[i][v]);
}

template <int V>
void strip(const float* a, int64_t row, int64_t step, int64_t rows, const float* b, int64_t depth, float* c, int64_t wide,
           bool add) {
    int64_t i = 0;
    for (; i + ROWS <= rows; i += ROWS) tile<ROWS, V>(a + i * row, row, step, b, depth, c + i * wide, wide, add);
    a += i * row, c += i * wide;
    switch (rows - i) {
        case 5: tile<5, V>(a, row, step, b, depth, c, wide, add); break;
        case 4: tile<4, V>(a, row, step, b, depth, c, wide, add); break;
        case 3: tile<3, V>(a, row, step, b, depth, c, wide, add); break;
        case 2: tile<2, V>(a, row, step, b, depth, c, wide, add); break;
        case 1: tile<1, V>(a, row, step, b, depth, c, wide, add); break;
    }
}

// c (rows x columns of b, rows `wide` apart) = or += a b[first : first + depth]; a's element (i, k) is a[i row + k step].
void multiply(const float* a, int64_t row, int64_t step, int64_t rows, const Panels& b, int64_t first, int64_t depth,
              float* c, int64_t wide, bool add) {
    for (int64_t j = 0; j < b.columns; j += PANEL) {
        const int64_t vectors = std::min<int64_t>(PANEL, b.columns - j) / LANES;
        const float* panel = b.data + j * b.depth + first * vectors * LANES;
        switch (vectors) {
#if LANES == 16
            case 4: strip<4>(a, row, step, rows, panel, depth, c + j, wide, add); break;
            case 3: strip<3>(a, row, step, rows, panel, depth, c + j, wide, add); break;
#endif
            case 2: strip<2>(a, row, step, rows, panel, depth, c + j, wide, add); break;
            case 1: strip<1>(a, row, step, rows, panel, depth, c + j, wide, add); break;
        }
    }
}

struct Forward {
    const Call& c;
    Panels keys, values;
    Room scores, sums, state, here;

    // Turns a row of scores into weights relative to the row's running maximum, and adds them to its total.
    void weigh(float* row, const float* present, int64_t columns, float& peak, float& total, float* result, int64_t wide) {
        vec highest = splat(NOTHING);
        for (int64_t x = 0; x < columns; x += LANES) {
            const vec score = load(row + x) * c.scale + load(present + x);
            store(row + x, score);
            highest = larger(highest, score);
        }
        const float most = top(highest);
        if (most > peak + 8.0f) {  // sums stay in range: no need to rescale for a little
            const float factor = std::exp(peak - most);
            peak = most, total *= factor;
            for (int64_t x = 0; x < wide; x += LANES) store(result + x, load(result + x) * factor);
        }
        vec part{};
        for (int64_t x = 0; x < columns; x += LANES) {
            const vec weight = exponential(load(row + x) - peak);
            store(row + x, weight);
            part += weight;
        }
        total += sum(part);
    }

    void run(int64_t b, int64_t h, int64_t first, int64_t n) {
        const int64_t block = c.key_block(), wide = whole(c.values);
        float *score = scores.get(QUERY_BLOCK * block), *result = sums.get(n * wide), *present = here.get(block);
        float *peak = state.get(2 * n), *total = peak + n;
        std::fill(result, result + n * wide, 0.0f);
        std::fill(peak, peak + n, NOTHING);
        std::fill(total, total + n, 0.0f);
        for (int64_t key = 0; key < c.keys; key += block) {
            const int64_t count = std::min(block, c.keys - key), columns = whole(count);
            keys.transposed(c.k.at(b, h, key), c.k.row, c.width, count);
            values.rows(c.v.at(b, h, key), c.v.row, count, c.values);
            c.presence(b, key, count, present);
            for (int64_t i = 0; i < n; i += QUERY_BLOCK) {
                const int64_t rows = std::min(QUERY_BLOCK, n - i);
                multiply(c.q.at(b, h, first + i), c.q.row, 1, rows, keys, 0, c.width, score, columns, false);
                for (int64_t r = 0, at = i; r < rows; r++, at++)
                    weigh(score + r * columns, present, columns, peak[at], total[at], result + at * wide, wide);
                multiply(score, columns, 1, rows, values, 0, count, result + i * wide, wide, true);
            }
        }
        for (int64_t i = 0; i < n; i++) {
            const float share = 1.0f / total[i];
            float* to = c.out.at(b, h, first + i);
            for (int64_t x = 0; x < c.values; x++) to[x] = result[i * wide + x] * share;
            c.lse[(b * c.heads + h) * c.queries + first + i] = peak[i] + std::log(total[i]);
        }
    }
};

struct Backward {
    const Call& c;
    Panels keys_across, keys_along, values_across, queries_along, slopes_along;
    Room weights, changes, query_sums, key_sums, value_sums, here;

    // weight = exp(score - lse); change = scale weight (change - delta).
    void differentiate(float* weight, float* change, const float* present, int64_t columns, int64_t at) {
        for (int64_t x = 0; x < columns; x += LANES) {
            const vec w = exponential(load(weight + x) * c.scale + load(present + x) - c.lse[at]);
            store(weight + x, w);
            store(change + x, w * (load(change + x) - c.delta[at]) * c.scale);
        }
    }

    void put(const float* from, int64_t wide, int64_t count, int64_t width, const Array& to, int64_t b, int64_t h,
             int64_t first) {
        for (int64_t i = 0; i < count; i++) std::memcpy(to.at(b, h, first + i), from + i * wide, width * sizeof(float));
    }

    void run(int64_t b, int64_t h, int64_t first, int64_t n) {
        const int64_t block = c.key_block(), wide = whole(c.width), deep = whole(c.values);
        const bool shared = c.k.data == c.v.data, learned = c.dk.data, joined = c.dk.data == c.dv.data;
        float *weight = weights.get(QUERY_BLOCK * block), *change = changes.get(QUERY_BLOCK * block);
        float *present = here.get(block), *to_query = query_sums.get(n * wide), *to_key = nullptr, *to_value = nullptr;
        std::fill(to_query, to_query + n * wide, 0.0f);
        if (learned) {
            to_key = key_sums.get(block * wide), to_value = joined ? to_key : value_sums.get(block * deep);
            queries_along.rows(c.q.at(b, h, first), c.q.row, n, c.width);
            slopes_along.rows(c.slope.at(b, h, first), c.slope.row, n, c.values);
        }
        for (int64_t key = 0; key < c.keys; key += block) {
            const int64_t count = std::min(block, c.keys - key), columns = whole(count);
            keys_across.transposed(c.k.at(b, h, key), c.k.row, c.width, count);
            keys_along.rows(c.k.at(b, h, key), c.k.row, count, c.width);
            if (!shared) values_across.transposed(c.v.at(b, h, key), c.v.row, c.values, count);
            c.presence(b, key, count, present);
            for (int64_t i = 0; i < n; i += QUERY_BLOCK) {
                const int64_t rows = std::min(QUERY_BLOCK, n - i), at = (b * c.heads + h) * c.queries + first + i;
                multiply(c.q.at(b, h, first + i), c.q.row, 1, rows, keys_across, 0, c.width, weight, columns, false);
                multiply(c.slope.at(b, h, first + i), c.slope.row, 1, rows, shared ? keys_across : values_across, 0,
                         c.values, change, columns, false);
                for (int64_t r = 0; r < rows; r++)
                    differentiate(weight + r * columns, change + r * columns, present, columns, at + r);
                multiply(change, columns, 1, rows, keys_along, 0, count, to_query + i * wide, wide, true);
                if (!learned) continue;
                multiply(weight, 1, columns, count, slopes_along, i, rows, to_value, deep, i > 0);
                multiply(change, 1, columns, count, queries_along, i, rows, to_key, wide, joined || i > 0);
            }
            if (learned) put(to_key, wide, count, c.width, c.dk, b, h, key);
            if (learned && !joined) put(to_value, deep, count, c.values, c.dv, b, h, key);
        }
        put(to_query, wide, n, c.width, c.dq, b, h, first);
    }
};

// Runs a task over items and heads; where there are few of them, over parts of the queries too if `divisible`.
template <class Task> int over_heads(const Call& c, bool divisible) {
    int64_t size = c.queries;
    const int64_t heads = c.batch * c.heads;
    while (divisible && heads * ((c.queries + size - 1) / size) < 2 * c.threads && size > QUERY_BLOCK) size = (size + 1) / 2;
    const int64_t parts = (c.queries + size - 1) / size;
#pragma omp parallel num_threads(c.threads) if (c.threads > 1)
    {
        Task own{c};
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < heads * parts; i++) {
            const int64_t head = i / parts, first = i % parts * size;
            own.run(head / c.heads, head % c.heads, first, std::min(size, c.queries - first));
        }
    }
    return 0;
}

// sizes: batch, heads, queries, keys, width, values, threads, then three strides for each array.
Call unpack(const int64_t* sizes, float scale, float* const* data, const uint8_t* mask, float* lse, const float* delta) {
    Call c{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], scale, {}, {}, {}, {}, {}, {}, {}, {},
           mask, lse, delta};
    Array* arrays[] = {&c.q, &c.k, &c.v, &c.out, &c.slope, &c.dq, &c.dk, &c.dv};
    sizes += 7;
    for (Array* array : arrays) *array = {*data++, sizes[0], sizes[1], sizes[2]}, sizes += 3;
    return c;
}

}  // namespace

extern "C" {

int attention_forward(const int64_t* sizes, float scale, float* const* data, const uint8_t* mask, float* lse,
                      const float* delta) {
    return over_heads<Forward>(unpack(sizes, scale, data, mask, lse, delta), true);
}

int attention_backward(const int64_t* sizes, float scale, float* const* data, const uint8_t* mask, float* lse,
                       const float* delta) {
    const Call c = unpack(sizes, scale, data, mask, lse, delta);
    return over_heads<Backward>(c, !c.dk.data);
}
}
