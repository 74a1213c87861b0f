// Attention over a grid whose score is q . feature + scale * (row + column), in one pass over the grid.
//
// Forward: the softmax's moments (see perceiver/kernels/shared_kv.py: separable_moments) and its log-sum-exp.
// Backward: the gradients of q, rows and columns, with the scores computed again.
// Arrays are float32, contiguous: q (B,N,F), rows (B,N,H), columns (B,N,W), features (B,F,H*W), scale (B,H*W).
// A block of QUERIES queries shares each load of the grid; a row of the grid is padded to whole vectors.

#include <vector>

#include "vector.h"

namespace {

constexpr int QUERIES = 4;

struct Shape { int64_t batch, queries, height, width; };

// One batch item's planes (F features, then scale), rows padded with zeros to whole vectors.
template <int F> struct Planes {
    std::vector<float> room;
    const float* plane[F + 1];
    int64_t stride;

    void set(const float* features, const float* scale, const Shape& s) {
        const int64_t size = s.height * s.width;
        stride = (s.width + LANES - 1) / LANES * LANES;
        for (int f = 0; f <= F; f++) plane[f] = f < F ? features + f * size : scale;
        if (stride == s.width) return;
        room.assign((F + 1) * s.height * stride, 0.0f);
        for (int f = 0; f <= F; f++) {
            float* to = room.data() + f * s.height * stride;
            for (int64_t y = 0; y < s.height; y++)
                std::memcpy(to + y * stride, plane[f] + y * s.width, s.width * sizeof(float));
            plane[f] = to;
        }
    }
};

// A block of Q queries' parameters and sums over the grid.
template <int F, int Q> struct Block {
    vec q[Q][F], moment[Q][F];
    std::vector<float> columns, by_column;
    void start(const float* query, const float* column, int64_t width, int64_t stride) {
        columns.assign(Q * stride, 0.0f);
        by_column.assign(Q * stride, 0.0f);
        for (int k = 0; k < Q; k++) {
            std::memcpy(&columns[k * stride], column + k * width, width * sizeof(float));
            for (int f = 0; f < F; f++) { q[k][f] = splat(query[k * F + f]); moment[k][f] = vec{}; }
        }
    }
    inline vec score(int k, const vec* x, float row, int64_t at, int64_t stride) const {
        vec s = x[F] * (load(&columns[k * stride + at]) + row);
        for (int f = 0; f < F; f++) s += q[k][f] * x[f];
        return s;
    }
    inline void add(int k, const vec* x, vec weight, vec scaled, int64_t at, int64_t stride) {
        for (int f = 0; f < F; f++) moment[k][f] += weight * x[f];
        float* column = &by_column[k * stride + at];
        store(column, load(column) + scaled);
    }
};

template <int F, int Q>
void forward_block(const Planes<F>& planes, const Shape& s, const float* q, const float* rows, const float* columns,
                   float* out_q, float* out_rows, float* out_columns, float* lse) {
    const int64_t stride = planes.stride, last = stride - LANES;
    Block<F, Q> block;
    block.start(q, columns, s.width, stride);
    std::vector<float> scores(Q * stride);
    vec exists;
    for (int i = 0; i < LANES; i++) exists[i] = last + i < s.width ? 0.0f : NOTHING;
    float shift[Q];
    vec total[Q];
    for (int k = 0; k < Q; k++) { shift[k] = NOTHING; total[k] = vec{}; }
    for (int64_t y = 0; y < s.height; y++) {
        vec highest[Q];
        for (int k = 0; k < Q; k++) highest[k] = splat(NOTHING);
        for (int64_t at = 0; at < stride; at += LANES) {
            vec x[F + 1];
            for (int f = 0; f <= F; f++) x[f] = load(planes.plane[f] + y * stride + at);
            for (int k = 0; k < Q; k++) {
                vec score = block.score(k, x, rows[k * s.height + y], at, stride);
                if (at == last) score += exists;
                store(&scores[k * stride + at], score);
                highest[k] = larger(highest[k], score);
            }
        }
        for (int k = 0; k < Q; k++) {
            const float peak = top(highest[k]);
            if (peak <= shift[k] + 8.0f) continue;  // sums stay in range: no need to rescale for a little
            const float scale = std::exp(shift[k] - peak);
            shift[k] = peak;
            total[k] *= scale;
            for (int f = 0; f < F; f++) block.moment[k][f] *= scale;
            for (int64_t at = 0; at < stride; at++) block.by_column[k * stride + at] *= scale;
            for (int64_t z = 0; z < y; z++) out_rows[k * s.height + z] *= scale;
        }
        vec by_row[Q];
        for (int k = 0; k < Q; k++) by_row[k] = vec{};
        for (int64_t at = 0; at < stride; at += LANES) {
            vec x[F + 1];
            for (int f = 0; f <= F; f++) x[f] = load(planes.plane[f] + y * stride + at);
            for (int k = 0; k < Q; k++) {
                const vec weight = exponential(load(&scores[k * stride + at]) - shift[k]);
                const vec scaled = weight * x[F];
                total[k] += weight;
                by_row[k] += scaled;
                block.add(k, x, weight, scaled, at, stride);
            }
        }
        for (int k = 0; k < Q; k++) out_rows[k * s.height + y] = sum(by_row[k]);
    }
    for (int k = 0; k < Q; k++) {
        const float whole = sum(total[k]), share = 1.0f / whole;
        lse[k] = shift[k] + std::log(whole);
        for (int f = 0; f < F; f++) out_q[k * F + f] = sum(block.moment[k][f]) * share;
        for (int64_t y = 0; y < s.height; y++) out_rows[k * s.height + y] *= share;
        for (int64_t x = 0; x < s.width; x++) out_columns[k * s.width + x] = block.by_column[k * stride + x] * share;
    }
}

template <int F, int Q>
void backward_block(const Planes<F>& planes, const Shape& s, const float* q, const float* rows, const float* columns,
                    const float* lse, const float* slope_q, const float* slope_rows, const float* slope_columns,
                    const float* delta, float* out_q, float* out_rows, float* out_columns) {
    const int64_t stride = planes.stride;
    Block<F, Q> block, slope;
    block.start(q, columns, s.width, stride);
    slope.start(slope_q, slope_columns, s.width, stride);
    for (int64_t y = 0; y < s.height; y++) {
        vec by_row[Q];
        for (int k = 0; k < Q; k++) by_row[k] = vec{};
        for (int64_t at = 0; at < stride; at += LANES) {
            vec x[F + 1];
            for (int f = 0; f <= F; f++) x[f] = load(planes.plane[f] + y * stride + at);
            for (int k = 0; k < Q; k++) {
                const vec score = block.score(k, x, rows[k * s.height + y], at, stride);
                const vec change = slope.score(k, x, slope_rows[k * s.height + y], at, stride) - delta[k];
                // Padding has zero features and scale, so whatever its weight it adds nothing; keep it finite.
                const vec excess = score - lse[k];
                const vec weight = exponential(excess > 80.0f ? splat(80.0f) : excess) * change;
                const vec scaled = weight * x[F];
                by_row[k] += scaled;
                block.add(k, x, weight, scaled, at, stride);
            }
        }
        for (int k = 0; k < Q; k++) out_rows[k * s.height + y] = sum(by_row[k]);
    }
    for (int k = 0; k < Q; k++) {
        for (int f = 0; f < F; f++) out_q[k * F + f] = sum(block.moment[k][f]);
        for (int64_t x = 0; x < s.width; x++) out_columns[k * s.width + x] = block.by_column[k * stride + x];
    }
}

// Calls `run(planes, first query as an index over the batch, block size 1 or QUERIES)` over batch and queries.
template <int F, class Run>
void over_blocks(const Shape& s, const float* features, const float* scale, int threads, const Run& run) {
    const int64_t size = s.height * s.width;
    int64_t chunk = s.queries;  // queries that share a packed copy of the planes
    while (s.batch * ((s.queries + chunk - 1) / chunk) < 4 * threads && chunk > QUERIES) chunk = (chunk + 1) / 2;
    chunk = (chunk + QUERIES - 1) / QUERIES * QUERIES;
    const int64_t chunks = (s.queries + chunk - 1) / chunk, tasks = s.batch * chunks;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Planes<F> planes;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t b = task / chunks, first = task % chunks * chunk;
            const int64_t end = first + chunk < s.queries ? first + chunk : s.queries;
            planes.set(features + b * F * size, scale + b * size, s);
            int64_t n = first;
            for (; n + QUERIES <= end; n += QUERIES) run(planes, b * s.queries + n, QUERIES);
            for (; n < end; n++) run(planes, b * s.queries + n, 1);
        }
    }
}

template <int F>
void forward(const Shape& s, int threads, const float* q, const float* rows, const float* columns,
             const float* features, const float* scale, float* out_q, float* out_rows, float* out_columns, float* lse) {
    over_blocks<F>(s, features, scale, threads, [&](const Planes<F>& planes, int64_t n, int size) {
        const int64_t h = n * s.height, w = n * s.width, f = n * F;
        auto block = size == 1 ? forward_block<F, 1> : forward_block<F, QUERIES>;
        block(planes, s, q + f, rows + h, columns + w, out_q + f, out_rows + h, out_columns + w, lse + n);
    });
}

template <int F>
void backward(const Shape& s, int threads, const float* q, const float* rows, const float* columns,
              const float* features, const float* scale, const float* lse, const float* slope_q,
              const float* slope_rows, const float* slope_columns, const float* delta, float* out_q, float* out_rows,
              float* out_columns) {
    over_blocks<F>(s, features, scale, threads, [&](const Planes<F>& planes, int64_t n, int size) {
        const int64_t h = n * s.height, w = n * s.width, f = n * F;
        auto block = size == 1 ? backward_block<F, 1> : backward_block<F, QUERIES>;
        block(planes, s, q + f, rows + h, columns + w, lse + n, slope_q + f, slope_rows + h, slope_columns + w,
              delta + n, out_q + f, out_rows + h, out_columns + w);
    });
}

}  // namespace

#define FOR_FEATURES(CALL) \
    switch (features_count) { case 1: CALL(1); break; case 2: CALL(2); break; case 3: CALL(3); break; \
                              case 4: CALL(4); break; case 5: CALL(5); break; default: return 1; } return 0;

extern "C" {

int separable_forward(int64_t batch, int64_t queries, int64_t features_count, int64_t height, int64_t width,
                      int threads, const float* q, const float* rows, const float* columns, const float* features,
                      const float* scale, float* out_q, float* out_rows, float* out_columns, float* lse) {
    const Shape s{batch, queries, height, width};
#define CALL(F) forward<F>(s, threads, q, rows, columns, features, scale, out_q, out_rows, out_columns, lse)
    FOR_FEATURES(CALL)
#undef CALL
}

int separable_backward(int64_t batch, int64_t queries, int64_t features_count, int64_t height, int64_t width,
                       int threads, const float* q, const float* rows, const float* columns, const float* features,
                       const float* scale, const float* lse, const float* slope_q, const float* slope_rows,
                       const float* slope_columns, const float* delta, float* out_q, float* out_rows,
                       float* out_columns) {
    const Shape s{batch, queries, height, width};
#define CALL(F) backward<F>(s, threads, q, rows, columns, features, scale, lse, slope_q, slope_rows, slope_columns, \
                            delta, out_q, out_rows, out_columns)
    FOR_FEATURES(CALL)
#undef CALL
}
}
