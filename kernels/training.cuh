// The inner loop of training's products: a tile of 64 rows by 64 columns of the result, all of it in f32.
//
// A block of 256 threads goes through the depth in steps of 32: it brings that much of both sides to shared memory, 64
// numbers of each a place of the depth, weights as the f32 they stand for; then each thread multiplies four numbers of
// one side by four of the other. So a number of the result is one sum over the depth in rising order, whatever tile it is
// in; what fills the last step up adds zeros to it.
//
// Shared memory: 17,408 bytes. A thread reads 32 bytes of it for 16 multiply-adds.

#pragma once

#include "formats.cuh"

constexpr uint32_t THREADS = 256;
constexpr uint32_t TILE = 64;
constexpr uint32_t STEP = 32;
// Numbers of a place of the depth; four more than a tile, so that a warp that writes along the depth meets more banks.
constexpr uint32_t PITCH = TILE + 4;

struct alignas(16) FourFloats {
    float number[4];
};

// What a thread has of a tile: rows 4 * (t / 16) and on, columns 4 * (t % 16) and on.
struct TileSums {
    float of[4][4];
};

DEVICE uint32_t tile_row() { return 4 * (thread_index() / 16); }
DEVICE uint32_t tile_column() { return 4 * (thread_index() % 16); }

// `rows(first, tile)` and `columns(first, tile)` have all threads write `[STEP][PITCH]` numbers of their side from the
// place `first` of the depth on, zeros past the ends.
template <class Rows, class Columns>
DEVICE TileSums multiply_tile(uint32_t depth, const Rows &rows, const Columns &columns) {
    SHARED(FourFloats, row_tile, STEP * PITCH / 4);
    SHARED(FourFloats, column_tile, STEP * PITCH / 4);
    TileSums sums = {};
    for (uint32_t first = 0; first < depth; first += STEP) {
        // Whoever still reads the step before is waited for.
        barrier();
        rows(first, &row_tile[0].number[0]);
        columns(first, &column_tile[0].number[0]);
        barrier();
        for (uint32_t place = 0; place < STEP; place++) {
            FourFloats a = row_tile[(place * PITCH + tile_row()) / 4];
            FourFloats b = column_tile[(place * PITCH + tile_column()) / 4];
            UNROLL
            for (uint32_t i = 0; i < 4; i++) {
                UNROLL
                for (uint32_t j = 0; j < 4; j++) {
                    sums.of[i][j] = multiply_add(a.number[i], b.number[j], sums.of[i][j]);
                }
            }
        }
    }
    return sums;
}

// A side that is a matrix of f32: number (row, place) is at row * row_step + place * depth_step, one of which is 1.
struct NumberSide {
    const float *numbers;
    // From the tile's first on.
    uint32_t rows;
    uint32_t depth;
    uint32_t row_step;
    uint32_t depth_step;

    DEVICE void operator()(uint32_t first, float *tile) const {
        bool is_along_depth = depth_step == 1;
        for (uint32_t index = thread_index(); index < TILE * STEP; index += THREADS) {
            // Neighbours in memory are read by neighbours.
            uint32_t place = is_along_depth ? index % STEP : index / TILE;
            uint32_t row = is_along_depth ? index / STEP : index % TILE;
            float number = 0.0f;
            if (row < rows && first + place < depth) {
                number = numbers[static_cast<size_t>(row) * row_step + static_cast<size_t>(first + place) * depth_step];
            }
            tile[place * PITCH + row] = number;
        }
    }
};

// The columns of one word.
template <class Format> struct WordNumbers {
    float of[Format::COLUMNS];
};

// What a word of a matrix stands for: columns `column` and on of a row; zeros past the ends.
template <class Format>
DEVICE WordNumbers<Format> read_word(const MatrixArguments &matrix, uint32_t row, uint32_t rows, uint32_t column,
                                     uint32_t columns) {
    WordNumbers<Format> numbers = {};
    if (row < rows && column < columns) {
        Panel panel = panel_of<Format>(matrix, row / PANEL_ROWS);
        const uint8_t *line = panel.lines + static_cast<size_t>(column / Format::COLUMNS) * LINE_BYTES;
        uint32_t word = reinterpret_cast<const uint32_t *>(line)[row % PANEL_ROWS];
        float scale = scale_of<Format>(panel, column, row % PANEL_ROWS);
        UNROLL
        for (uint32_t i = 0; i < Format::COLUMNS; i++) {
            numbers.of[i] = column + i < columns ? Format::number(word, i) * scale : 0.0f;
        }
    }
    return numbers;
}

// A side that is 64 rows of weights, with the depth along their columns.
template <class Format> struct WeightRows {
    const MatrixArguments &matrix;
    uint32_t first_row;
    uint32_t rows;
    uint32_t columns;

    DEVICE void operator()(uint32_t first, float *tile) const {
        constexpr uint32_t WORDS = STEP / Format::COLUMNS;
        for (uint32_t index = thread_index(); index < TILE * WORDS; index += THREADS) {
            // Lines as they lie: a row after the other, then the next line, then the next panel.
            uint32_t word = index / PANEL_ROWS % WORDS;
            uint32_t row = index / PANEL_ROWS / WORDS * PANEL_ROWS + index % PANEL_ROWS;
            uint32_t place = word * Format::COLUMNS;
            auto numbers = read_word<Format>(matrix, first_row + row, rows, first + place, columns);
            UNROLL
            for (uint32_t i = 0; i < Format::COLUMNS; i++) {
                tile[(place + i) * PITCH + row] = numbers.of[i];
            }
        }
    }
};

// A side that is 64 columns of weights, with the depth along their rows.
template <class Format> struct WeightColumns {
    const MatrixArguments &matrix;
    // Where the depth begins.
    uint32_t first_row;
    uint32_t rows;
    uint32_t first_column;
    uint32_t columns;

    DEVICE void operator()(uint32_t first, float *tile) const {
        constexpr uint32_t WORDS = TILE / Format::COLUMNS;
        for (uint32_t index = thread_index(); index < STEP * WORDS; index += THREADS) {
            uint32_t word = index / PANEL_ROWS % WORDS;
            uint32_t place = index / PANEL_ROWS / WORDS * PANEL_ROWS + index % PANEL_ROWS;
            uint32_t column = word * Format::COLUMNS;
            auto numbers =
                read_word<Format>(matrix, first_row + first + place, rows, first_column + column, columns);
            UNROLL
            for (uint32_t i = 0; i < Format::COLUMNS; i++) {
                tile[place * PITCH + column + i] = numbers.of[i];
            }
        }
    }
};

// `write(row, column, sum)` for each number of a tile that the result has, from its first row and column on.
template <class Write> DEVICE void for_each_sum(const TileSums &sums, uint32_t rows, uint32_t columns, Write write) {
    UNROLL
    for (uint32_t i = 0; i < 4; i++) {
        UNROLL
        for (uint32_t j = 0; j < 4; j++) {
            if (tile_row() + i < rows && tile_column() + j < columns) {
                write(tile_row() + i, tile_column() + j, sums.of[i][j]);
            }
        }
    }
}

// Where a tile of the result begins, and the numbers of a row of all of it.
struct TileOut {
    float *out;
    size_t stride;
    bool accumulate;

    DEVICE void operator()(uint32_t row, uint32_t column, float sum) const {
        float &number = out[row * stride + column];
        number = accumulate ? number + sum : sum;
    }
};
