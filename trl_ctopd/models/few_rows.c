// y = x w' for few rows of x, in one pass over w. Row-major float32: x (m, k), w (n, k), y (m, n).
//
// A tile is ROWS rows of x by 4 rows of w: as many sums as there are registers. The rows of w stay in the first cache while
// all rows of x pass by.

#define AHEAD 8 // rows of w

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 4
#elif defined(__AVX__)
#define LANES 8
#define ROWS 2
#else
#define LANES 4
#define ROWS 2
#endif

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));

static inline __attribute__((always_inline)) float sum_of(lanes all)
{
    four sum;
#if LANES == 16
    const eight half = ((const eight *)&all)[0] + ((const eight *)&all)[1];
    sum = ((const four *)&half)[0] + ((const four *)&half)[1];
#elif LANES == 8
    sum = ((const four *)&all)[0] + ((const four *)&all)[1];
#else
    sum = all;
#endif
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

static inline __attribute__((always_inline)) void tile(
    const float *x, const float *w, float *y, long n, long k, const int rows, const int columns)
{
    lanes sums[ROWS][4];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++)
            sums[i][j] = (lanes){0};
    long at = 0;
    for (; at + LANES <= k; at += LANES) {
        lanes weights[4];
        for (int j = 0; j < columns; j++)
            weights[j] = *(const lanes *)(w + j * k + at);
        for (int j = 0; j < columns; j++)
            __builtin_prefetch(w + (j + AHEAD) * k + at);
        for (int i = 0; i < rows; i++) {
            const lanes own = *(const lanes *)(x + i * k + at);
            for (int j = 0; j < columns; j++)
                sums[i][j] += own * weights[j];
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) {
            float sum = sum_of(sums[i][j]);
            for (long rest = at; rest < k; rest++)
                sum += x[i * k + rest] * w[j * k + rest];
            y[i * n + j] = sum;
        }
}

static inline __attribute__((always_inline)) void column(
    const float *x, const float *w, float *y, long m, long n, long k, const int columns)
{
    long row = 0;
    for (; row + ROWS <= m; row += ROWS)
        tile(x + row * k, w, y + row * n, n, k, ROWS, columns);
    for (; row < m; row++)
        tile(x + row * k, w, y + row * n, n, k, 1, columns);
}

void few_rows(const float *x, const float *w, float *y, long m, long n, long k, int threads)
{
    const long groups = (n + 3) / 4;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long group = 0; group < groups; group++) {
        const long first = 4 * group;
        if (first + 4 <= n)
            column(x, w + first * k, y + first, m, n, k, 4);
        else
            for (long own = first; own < n; own++)
                column(x, w + own * k, y + own, m, n, k, 1);
    }
}
